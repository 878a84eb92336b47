"""Targets follow PEFT's rules, and every entry must hit."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lrcompile import targeting
from lrcompile.errors import TargetError

NAMES = ["h.0.q", "h.0.k", "h.1.q", "h.1.mlp.up", "head", "shq"]


def test_a_list_hits_whole_names_and_suffixes_at_a_dot():
    assert targeting.select(NAMES, ["q", "head"]) == ["h.0.q", "h.1.q", "head"]


def test_a_string_is_a_regular_expression_for_whole_names():
    assert targeting.select(NAMES, r"h\.\d\.q") == ["h.0.q", "h.1.q"]
    with pytest.raises(TargetError, match="no whole name"):
        targeting.select(NAMES, r"\.q")


def test_exclude_wins():
    assert targeting.select(NAMES, ["q", "up"], ["1.q"]) == ["h.0.q", "h.1.mlp.up"]


def test_an_entry_that_hits_nothing_is_named_among_others_that_hit():
    with pytest.raises(TargetError, match=r"'qq'.*did you mean 'q'") as caught:
        targeting.select(NAMES, ["q", "qq"])
    assert caught.value.field == "targets"


def test_an_exclude_that_hits_nothing_is_named():
    with pytest.raises(TargetError, match="'zzz'") as caught:
        targeting.select(NAMES, ["q"], ["zzz"])
    assert caught.value.field == "exclude"


def test_a_pattern_that_hits_no_adapted_site_is_named():
    with pytest.raises(TargetError, match=r"rank_pattern.*'v'") as caught:
        targeting.require_patterns(["h.q"], {"q": 1, "v": 2}, "rank_pattern")
    assert caught.value.field == "rank_pattern"


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    name=st.lists(st.sampled_from(["layers", "h", "q", "0", "1", "7"]), min_size=1, max_size=5).map(".".join),
    layers=st.lists(st.integers(0, 7), min_size=1, max_size=2),
)
def test_layers_restrict_as_in_peft(name, layers):
    peft = pytest.importorskip("peft.tuners.tuners_utils")
    config = peft.PeftConfig()
    config.target_modules, config.exclude_modules = ["q"], None
    config.layers_to_transform, config.layers_pattern = layers, None
    name = f"base.model.{name}.q"  # PEFT does not look at layers where a target is the whole name
    theirs = bool(peft.check_target_module_exists(config, name))
    assert targeting.in_layers(name, layers) is theirs


def test_heads_are_what_the_model_says_they_are():
    transformers = pytest.importorskip("transformers")
    size = {
        "hidden_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 14,
        "vocab_size": 31,
    }
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**size, num_key_value_heads=1))
    assert set(targeting.output_heads(llama)) == {"lm_head"}
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(**size))
    assert "classifier" in targeting.output_heads(bert)
    assert not any(name.startswith("bert.") for name in targeting.output_heads(bert))


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(3, 2), nn.ModuleList([nn.Linear(3, 3)])
        self.gate_proj = nn.Linear(3, 3)


def test_a_router_is_a_gate_beside_experts_and_a_gate_projection_is_none():
    model: Any = nn.ModuleDict({"moe": Mixture(), "plain": nn.ModuleDict({"gate": nn.Linear(3, 3)})})
    assert targeting.is_router(model, "moe.gate")
    assert not targeting.is_router(model, "moe.gate_proj")
    assert not targeting.is_router(model, "plain.gate")
