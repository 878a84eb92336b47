"""A PEFT config and a spec say the same, both ways; what has no counterpart is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lrcompile
from lrcompile import Spec, SpecError
from lrcompile.matching import match

peft = pytest.importorskip("peft")

MINIMAL = {"peft_type": "LORA", "target_modules": ["q_proj", "v_proj"]}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj, self.o_proj = nn.Linear(5, 7), nn.Linear(5, 7), nn.Linear(7, 5)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.layers = nn.ModuleList([Block() for _ in range(3)])
        self.head = nn.Linear(5, 3)


def test_a_lora_config_becomes_a_spec():
    config = peft.LoraConfig(
        r=6,
        lora_alpha=9,
        lora_dropout=0.25,
        use_rslora=True,
        bias="lora_only",
        target_modules=["q_proj", "v_proj"],
        exclude_modules=["0.q_proj"],
        layers_to_transform=[0, 2],
        rank_pattern={"v_proj": 3},
        alpha_pattern={r"2\.q_proj": 4},
        modules_to_save=["head"],
        init_lora_weights="gaussian",
    )
    assert Spec.from_peft(config) == lrcompile.spec(
        "lora",
        rank=6,
        alpha=9,
        dropout=0.25,
        scaling="alpha/sqrt(r)",
        bias="lora_only",
        targets=tuple(sorted(["q_proj", "v_proj"])),
        exclude=["0.q_proj"],
        layers=[0, 2],
        rank_pattern={"v_proj": 3},
        alpha_pattern={r"2\.q_proj": 4},
        train_modules=["head"],
        init="gaussian",
    )


def test_the_least_config_there_is_has_pefts_defaults():
    spec = Spec.from_peft(MINIMAL)
    assert (spec.rank, spec.alpha, spec.dropout, spec.init, spec.bias) == (8, 8.0, 0.0, "kaiming", "none")


def test_a_config_as_peft_writes_it_is_read(tmp_path):
    peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", revision="main").save_pretrained(tmp_path)
    data = json.loads((tmp_path / "adapter_config.json").read_text())
    assert Spec.from_peft(data) == lrcompile.spec("lora", rank=8, alpha=8, targets=["q_proj"])


@pytest.mark.parametrize(
    "init", [(True, "kaiming"), (False, "kaiming"), ("gaussian", "gaussian"), ("orthogonal", "orthogonal")]
)
def test_initialisations_that_keep_the_base_are_mapped(init: tuple[Any, str]):
    assert Spec.from_peft(MINIMAL | {"init_lora_weights": init[0]}).init == init[1]


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "eva", "mica", 7])
def test_initialisations_that_are_something_else_are_refused(init: Any):
    with pytest.raises(SpecError, match="init_lora_weights") as raised:
        Spec.from_peft(MINIMAL | {"init_lora_weights": init})
    assert raised.value.field == "init"


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("lora_bias", True),
        ("layer_replication", [[0, 2]]),
        ("trainable_token_indices", [1, 2]),
        ("megatron_config", {"a": 1}),
        ("alora_invocation_tokens", [1]),
        ("use_qalora", True),
        ("kasa_config", {"a": 1}),
        ("use_bdlora", {"a": 1}),
        ("ensure_weight_tying", True),
        ("a_setting_of_tomorrow", True),
    ],
)
def test_a_setting_without_counterpart_is_refused_by_name(setting: str, value: Any):
    with pytest.raises(SpecError, match=setting) as raised:
        Spec.from_peft(MINIMAL | {setting: value})
    assert raised.value.field == setting


def test_a_setting_of_tomorrow_that_is_off_is_no_matter():
    assert Spec.from_peft(MINIMAL | {"a_setting_of_tomorrow": None, "another": False, "third": {}}) == Spec.from_peft(
        MINIMAL
    )


@pytest.mark.parametrize(
    "config",
    [
        {"peft_type": "LOHA", "target_modules": ["q_proj"]},
        {"target_modules": ["q_proj"]},
        {"peft_type": "LORA"},
        {"peft_type": "LORA", "target_modules": [7]},
        {"peft_type": "LORA", "target_modules": "("},
        MINIMAL | {"r": 0},
        MINIMAL | {"r": "8"},
        MINIMAL | {"lora_alpha": float("nan")},
        MINIMAL | {"bias": "some"},
        MINIMAL | {"rank_pattern": {"q": -1}},
        MINIMAL | {"rank_pattern": [1]},
        MINIMAL | {"layers_to_transform": "all"},
        MINIMAL | {"modules_to_save": "head"},
        {"peft_type": "LORA", "target_modules": "all-linear", "target_parameters": ["experts.down_proj"]},
        {"peft_type": "LORA", "target_modules": ".*", "layers_to_transform": [1]},
        [],
        "LORA",
        {1: 2},
    ],
)
def test_a_config_that_is_wrong_is_a_spec_error(config: Any):
    with pytest.raises(SpecError):
        Spec.from_peft(config)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"target_modules": ["q_proj"]}, ["0.q", "1.q", "2.q"]),
        ({"target_modules": r".*\.1\.[qv]_proj"}, ["1.q", "1.v"]),
        ({"target_modules": ["q_proj"], "layers_to_transform": 1}, ["1.q"]),
        ({"target_modules": ["o_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"}, ["0.o", "2.o"]),
        ({"target_modules": "all-linear"}, [f"{i}.{p}" for i in range(3) for p in "qvo"] + ["head"]),
        ({"target_modules": ["v_proj"], "target_parameters": ["1.o_proj.weight"]}, ["0.v", "1.v", "1.o", "2.v"]),
        ({"target_modules": r".*\.v_proj", "target_parameters": ["0.o_proj.weight"]}, ["0.v", "0.o", "1.v", "2.v"]),
        (
            {"target_modules": ["v_proj", "o_proj"], "exclude_modules": r".*\.[01]\.o_proj"},
            ["0.v", "1.v", "2.v", "2.o"],
        ),
    ],
)
def test_the_spec_hits_what_the_config_says(config: dict[str, Any], expected: list[str]):
    hit = [site.name for site in match(Model(), Spec.from_peft({"peft_type": "LORA", "r": 2} | config)).hit]
    assert hit == [name if name == "head" else f"inner.layers.{name}_proj" for name in expected]


def test_a_spec_becomes_what_peft_reads(tmp_path):
    spec = lrcompile.spec(
        "lora", rank=6, alpha=9, targets=["q_proj"], scaling="alpha/sqrt(r)", layers=[1], exclude=["x"]
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps(spec.to_peft(task_type="CAUSAL_LM")))
    config = peft.LoraConfig.from_pretrained(tmp_path)
    assert (config.r, config.lora_alpha, config.use_rslora, config.target_modules) == (6, 9, True, {"q_proj"})
    assert (config.layers_to_transform, config.exclude_modules, config.task_type) == ([1], {"x"}, "CAUSAL_LM")


def test_qlora_is_lora_to_peft():
    assert lrcompile.spec("qlora").to_peft()["peft_type"] == "LORA"


def test_a_setting_that_peft_does_not_have_is_refused():
    with pytest.raises(SpecError, match="lora_alhpa"):
        lrcompile.spec("lora").to_peft(lora_alhpa=3)


NAMES = st.sampled_from(["q_proj", "v_proj", "0.o_proj", "head"])
SPECS = st.fixed_dictionaries(
    {
        "rank": st.integers(1, 64),
        "alpha": st.floats(0.25, 64),
        "dropout": st.floats(0, 0.9),
        "targets": st.one_of(st.just("all-linear"), st.just(r".*\.q_proj"), st.lists(NAMES, min_size=1, unique=True)),
        "exclude": st.lists(NAMES, unique=True),
        "layers": st.one_of(st.none(), st.lists(st.integers(0, 9), min_size=1)),
        "rank_pattern": st.dictionaries(NAMES, st.integers(1, 9)),
        "alpha_pattern": st.dictionaries(NAMES, st.floats(0.5, 9)),
        "scaling": st.sampled_from(["alpha/r", "alpha/sqrt(r)"]),
        "init": st.sampled_from(["kaiming", "gaussian", "orthogonal"]),
        "bias": st.sampled_from(["none", "all", "lora_only"]),
        "train_modules": st.lists(NAMES, unique=True),
    }
)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(SPECS)
def test_what_peft_can_say_comes_back_equal(fields: dict[str, Any]):
    if isinstance(fields["targets"], str):
        fields["layers"] = None  # PEFT's layers_to_transform goes with a list
    spec = lrcompile.spec("lora", **fields)
    assert Spec.from_peft(json.loads(json.dumps(spec.to_peft()))) == spec
    assert Spec.from_peft(peft.LoraConfig(**spec.to_peft())).to_dict() | {
        "targets": 0,
        "exclude": 0,
        "train_modules": 0,
    } == (spec.to_dict() | {"targets": 0, "exclude": 0, "train_modules": 0})
