"""VeRA, AdaLoRA, (IA)³ and HiRA in PEFT's own layouts: for identical tensors outputs are identical, whichever of the
two wrote the folder.

Scales and values are exact in float32, in which PEFT keeps VeRA's projections whatever the base.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lrcompile
from lrcompile import AdapterError, Spec, SpecError
from lrcompile.state import adapter_set, state_of

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
IDS = torch.arange(10).reshape(2, 5) * 7 % 31
BUDGET = {"target_r": 1, "total_step": 40, "tinit": 3, "tfinal": 5, "deltaT": 2}


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=31,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        attn_implementation="eager",
    )
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=31, n_embd=12, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    return transformers.GPT2LMHeadModel(config)


def vera(**more: Any) -> Any:
    return peft.VeraConfig(r=3, d_initial=0.5, projection_prng_key=7, **more)


def adalora(**more: Any) -> Any:
    return peft.AdaLoraConfig(init_r=3, lora_alpha=6, **BUDGET, **more)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any], dict[str, Any]]] = {
    "vera": (llama, vera, {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "vera all-linear": (llama, vera, {"target_modules": "all-linear", "modules_to_save": ["norm"]}),
    "vera layers": (llama, vera, {"target_modules": ["up_proj"], "layers_to_transform": [1]}),
    "vera Conv1D": (gpt2, vera, {"target_modules": ["c_attn", "c_proj"], "bias": "vera_only", "fan_in_fan_out": True}),
    "adalora": (llama, adalora, {"target_modules": ["q_proj", "v_proj", "down_proj"], "modules_to_save": ["norm"]}),
    "adalora Conv1D": (gpt2, adalora, {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True}),
    "ia3": (llama, peft.IA3Config, {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": []}),
    "ia3 feedforward": (
        llama,
        peft.IA3Config,
        {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"], "modules_to_save": ["norm"]},
    ),
    "ia3 by expression": (
        llama,
        peft.IA3Config,
        {"target_modules": r".*\.(v|down)_proj", "feedforward_modules": r".*\.1\..*\.down_proj"},
    ),
    "ia3 Conv1D": (
        gpt2,
        peft.IA3Config,
        {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"], "fan_in_fan_out": True},
    ),
    "hira": (
        llama,
        peft.HiraConfig,
        {"r": 3, "target_modules": ["q_proj", "down_proj"]},
    ),
    "hira all-linear": (
        llama,
        peft.HiraConfig,
        {"r": 3, "target_modules": "all-linear", "exclude_modules": ["v_proj"], "modules_to_save": ["norm"]},
    ),
    "hira Conv1D": (
        gpt2,
        peft.HiraConfig,
        {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True, "init_weights": "gaussian"},
    ),
}


def base(build: Callable[[], nn.Module]) -> Any:
    torch.manual_seed(0)
    model: Any = build().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) / 3)
    return model


def trainable(model: Any) -> list[nn.Parameter]:
    """But for AdaLoRA's `ranknum`, which PEFT 0.21 lets train and does not save: it divides the scale."""
    return [p for name, p in model.named_parameters() if p.requires_grad and "ranknum" not in name]


def random(model: Any) -> Any:
    with torch.no_grad():
        for parameter in trainable(model):
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float32) / 2)
    return model.eval()


def out(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def close(ours: Tensor, theirs: Tensor) -> None:
    """Another order of products, through a few layers; AdaLoRA's scale, alpha/(r + 1e-5), is rounded to float32."""
    torch.testing.assert_close(
        ours, theirs, rtol=0, atol=8 * torch.finfo(torch.float32).eps * float(theirs.abs().max())
    )


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / WEIGHTS)


@pytest.mark.parametrize("name", CASES)
def test_what_peft_saved_computes_the_same_here_and_goes_back_unchanged(name: str, tmp_path: Path):
    build, config, settings = CASES[name]
    theirs = random(peft.get_peft_model(base(build), config(**settings), autocast_adapter_dtype=False))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lrcompile.load(base(build), tmp_path / "theirs").eval()
    assert state_of(ours).specs["default"].method == name.split()[0]
    assert not torch.equal(out(ours), out(base(build)))
    close(out(ours), out(theirs))
    lrcompile.save(ours, tmp_path / "ours")
    written, read = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")
    assert written.keys() == read.keys()
    assert [key for key, tensor in written.items() if not torch.equal(tensor, read[key])] == []
    again = peft.PeftModel.from_pretrained(base(build), tmp_path / "ours", autocast_adapter_dtype=False)
    assert torch.equal(out(again.eval()), out(theirs))


@pytest.mark.parametrize(
    ("build", "method", "fields"),
    [
        (llama, "vera", {"rank": 3, "dropout": 0.5, "bias": "all", "train_modules": ["norm"]}),
        (gpt2, "vera", {"rank": 3, "bias": "lora_only", "layers": [1]}),
        (llama, "adalora", {"rank": 4, "alpha": 8, "target_rank": 2, "total_steps": 9, "exclude": ["up_proj"]}),
        (gpt2, "adalora", {"rank": 4, "alpha": 8, "target_rank": 2, "total_steps": 9, "bias": "lora_only"}),
        (llama, "ia3", {"feedforward": ["up_proj", "1.mlp.down_proj"], "exclude": ["o_proj"]}),
        (gpt2, "ia3", {"train_modules": ["ln_f"]}),
        (llama, "hira", {"rank": 3, "dropout": 0.5, "train_modules": ["norm"]}),
        (gpt2, "hira", {"rank": 3, "layers": [1], "init": "gaussian"}),
    ],
)
def test_what_was_applied_here_computes_the_same_in_peft(
    build: Any, method: str, fields: dict[str, Any], tmp_path: Path
):
    spec = lrcompile.spec(method, **{"targets": "all-linear"} | fields)
    ours = random(lrcompile.apply(base(build), spec))
    lrcompile.save(ours, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["peft_type"] == method.upper()
    theirs = peft.PeftModel.from_pretrained(base(build), tmp_path, autocast_adapter_dtype=False)
    close(out(ours), out(theirs.eval()))
    (tmp_path / "lrcompile.json").unlink()
    assert torch.equal(out(lrcompile.load(base(build), tmp_path)), out(ours))


def test_an_adalora_that_peft_has_pruned_computes_the_same_here(tmp_path: Path):
    config = adalora(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(base(llama), config, autocast_adapter_dtype=False)
    optimizer = torch.optim.AdamW(trainable(theirs), lr=0.05)
    for step in range(1, 41):
        optimizer.zero_grad()
        theirs(IDS, labels=IDS).loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    assert {tensor.shape[0] for key, tensor in tensors(tmp_path / "theirs").items() if "lora_E" in key} != {3}
    ours = lrcompile.load(base(llama), tmp_path / "theirs").eval()
    close(out(ours), out(theirs))
    assert adapter_set(ours, state_of(ours).sites["default"][0])["default"].A.shape == (3, 12)
    lrcompile.save(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(base(llama), tmp_path / "ours", autocast_adapter_dtype=False)
    close(out(again.eval()), out(theirs))


@pytest.mark.parametrize("mask", [[True], [True, False, 1], "all", [True, True, True, False], {}])
def test_a_pattern_of_ranks_that_cannot_be_is_refused(mask: Any, tmp_path: Path):
    config = adalora(target_modules=["q_proj"])
    peft.get_peft_model(base(llama), config, autocast_adapter_dtype=False).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / CONFIG).read_text())
    settings["rank_pattern"] = {"model.layers.0.self_attn.q_proj.lora_E": mask}
    (tmp_path / CONFIG).write_text(json.dumps(settings))
    with pytest.raises(AdapterError, match=r"rank_pattern of model\.layers\.0"):
        lrcompile.load(base(llama), tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_a_spec_and_a_config_say_the_same(name: str):
    _, config, settings = CASES[name]
    given = config(**settings)
    if isinstance(settings.get("feedforward_modules"), str):
        with pytest.raises(SpecError, match="regular expression"):
            Spec.from_peft(given)
        return
    spec = Spec.from_peft(given)
    assert Spec.from_peft(json.loads(json.dumps(spec.to_peft()))) == spec
    written = spec.to_peft()
    for key, value in given.to_dict().items():
        if key in written and value is not None and key not in ("fan_in_fan_out", "inference_mode"):
            assert (set(value) if isinstance(value, set) else value) == (
                set(written[key]) if isinstance(value, set) else written[key]
            ), key


@pytest.mark.parametrize(
    ("method", "fields", "reason"),
    [
        ("adalora", {"rank": 4, "target_rank": 1, "total_steps": 9, "rank_pattern": {"q_proj": 2}}, "one rank"),
        ("vera", {"exclude": ["q_proj"]}, "exclude_modules"),
        ("ia3", {"bias": "all"}, "trains no biases"),
        ("ia3", {"layers": [1]}, "restricted"),
        ("hira", {"rank": 2, "bias": "all"}, "trains no biases"),
        ("hira", {"rank": 3, "rank_pattern": {"up_proj": 2}}, "no notice"),
    ],
)
def test_what_pefts_settings_cannot_say_is_refused_and_saved_in_our_layout(
    method: str, fields: dict[str, Any], reason: str, tmp_path: Path
):
    spec = lrcompile.spec(method, **{"targets": "all-linear"} | fields)
    with pytest.raises(SpecError, match=reason):
        spec.to_peft()
    ours = random(lrcompile.apply(base(llama), spec))
    lrcompile.save(ours, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["peft_type"] == "LRCOMPILE"
    assert torch.equal(out(lrcompile.load(base(llama), tmp_path).eval()), out(ours))


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"peft_type": "ADALORA", "target_modules": ["q_proj"]}, "total_step"),
        ({"peft_type": "ADALORA", "target_modules": ["q_proj"], "total_step": 9, "use_dora": True}, "use_dora"),
        ({"peft_type": "ADALORA", "target_modules": ["q_proj"], "total_step": "9"}, "total_steps"),
        ({"peft_type": "IA3", "target_modules": ["q_proj"]}, "feedforward_modules"),
        ({"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": [1]}, "feedforward_modules"),
        ({"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": 1}, "feedforward_modules"),
        ({"peft_type": "HIRA", "target_modules": ["q_proj"], "bias": "all"}, "bias"),
        ({"peft_type": "HIRA", "target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"peft_type": "HIRA", "target_modules": ["q_proj"], "init_weights": "pissa"}, "init_weights"),
        ({"peft_type": "VERA", "target_modules": ["q_proj"], "lora_alpha": 3}, "lora_alpha"),
        ({"peft_type": "VERA", "target_modules": ["q_proj"], "r": -1}, "rank"),
        ({"peft_type": "VERA", "target_modules": ["q_proj"], "bias": "lora_onl"}, "bias"),
    ],
)
def test_a_config_that_is_wrong_names_the_setting(config: dict[str, Any], field: str):
    with pytest.raises(SpecError) as raised:
        Spec.from_peft(config)
    assert raised.value.field == field


def test_a_folder_without_veras_projections_is_refused(tmp_path: Path):
    config = vera(target_modules=["q_proj"], save_projection=False)
    random(peft.get_peft_model(base(llama), config, autocast_adapter_dtype=False)).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=r"missing keys \(2\): base_model.vera_A, base_model.vera_B"):
        lrcompile.load(base(llama), tmp_path)
