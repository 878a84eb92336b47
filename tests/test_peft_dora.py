"""DoRA in PEFT's layout: for identical tensors outputs are identical, whichever of the two wrote the folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from zoo.sealing import resealed

import lrcompile
from lrcompile.state import state_of

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif("dora" not in lrcompile.methods(), reason="dora is not registered"),
]


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


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "linear": (llama, {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "all-linear": (llama, {"target_modules": "all-linear", "modules_to_save": ["norm"]}),
    "rank-stabilised": (llama, {"target_modules": ["k_proj"], "use_rslora": True}),
    "patterns": (
        llama,
        {
            "target_modules": ["up_proj", "o_proj"],
            "rank_pattern": {"o_proj": 2},
            "alpha_pattern": {r"1\.self_attn\.o_proj": 3},
        },
    ),
    "Conv1D": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
}
IDS = torch.arange(10).reshape(2, 5) * 7 % 31


def base(build: Callable[[], nn.Module]) -> Any:
    torch.manual_seed(0)
    model: Any = build().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) / 3)
    return model


def random(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) / 2)
    return model.eval()


def out(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def close(ours: Tensor, theirs: Tensor) -> None:
    """The norm of a row in another order of summation, through a few layers (the scales here are exact in float32)."""
    torch.testing.assert_close(
        ours, theirs, rtol=0, atol=512 * torch.finfo(theirs.dtype).eps * float(theirs.abs().max())
    )


@pytest.mark.parametrize("name", CASES)
def test_what_peft_saved_computes_the_same_here_and_goes_back_unchanged(name: str, tmp_path: Path):
    build, settings = CASES[name]
    config = peft.LoraConfig(r=4, lora_alpha=5, use_dora=True, task_type="CAUSAL_LM", **settings)
    theirs: Any = random(peft.get_peft_model(base(build), config, autocast_adapter_dtype=False))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lrcompile.load(base(build), tmp_path / "theirs").eval()
    assert state_of(ours).specs["default"].method == "dora"
    close(out(ours), out(theirs))
    lrcompile.save(ours, tmp_path / "ours")
    written, read = (
        load_file(tmp_path / "ours/adapter_model.safetensors"),
        load_file(tmp_path / "theirs/adapter_model.safetensors"),
    )
    assert written.keys() == read.keys()
    assert all(torch.equal(tensor, read[key]) for key, tensor in written.items())
    again = peft.PeftModel.from_pretrained(base(build), tmp_path / "ours", autocast_adapter_dtype=False)
    assert torch.equal(out(again.eval()), out(theirs))


@pytest.mark.parametrize(
    ("build", "fields"),
    [
        (llama, {"targets": "all-linear", "rank_pattern": {"v_proj": 2}, "bias": "all"}),
        (llama, {"targets": ["q_proj"], "scaling": "alpha/sqrt(r)", "train_modules": ["norm"], "dropout": 0.5}),
        (gpt2, {"targets": "all-linear", "layers": [1]}),
    ],
    ids=["all-linear", "rank-stabilised", "Conv1D"],
)
def test_what_was_applied_here_computes_the_same_in_peft(build: Any, fields: dict[str, Any], tmp_path: Path):
    ours = random(lrcompile.apply(base(build), lrcompile.spec("dora", rank=4, alpha=5, **fields)))
    lrcompile.save(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(build), tmp_path, autocast_adapter_dtype=False)
    close(out(ours), out(theirs.eval()))
    (tmp_path / "lrcompile.json").unlink()
    assert torch.equal(out(lrcompile.load(base(build), tmp_path)), out(ours))


def test_a_magnitude_that_is_missing_misshapen_or_not_asked_for_is_refused(tmp_path: Path):
    from safetensors.torch import save_file

    ours = random(lrcompile.apply(base(llama), lrcompile.spec("dora", rank=2, targets=["k_proj"])))
    lrcompile.save(ours, tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    key = next(key for key in tensors if key.endswith("lora_magnitude_vector"))
    for changed, said in (
        ({k: t for k, t in tensors.items() if k != key}, "missing keys"),
        (tensors | {key: torch.ones(7, dtype=torch.float64)}, "wrong shapes"),
    ):
        save_file(changed, weights)
        resealed(weights.parent)
        with pytest.raises(lrcompile.AdapterError, match=f"{said}.*lora_magnitude_vector"):
            lrcompile.load(base(llama), tmp_path)
    save_file(tensors, weights)
    resealed(weights.parent)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": False}))
    with pytest.raises(lrcompile.AdapterError, match=r"unknown keys.*lora_magnitude_vector"):
        lrcompile.load(base(llama), tmp_path)


def test_the_spec_and_the_config_say_the_same():
    spec = lrcompile.spec("dora", rank=6, alpha=9, targets=["q_proj"], scaling="alpha/sqrt(r)")
    assert spec.to_peft()["use_dora"] is True
    assert lrcompile.Spec.from_peft(spec.to_peft()) == spec
    assert lrcompile.Spec.from_peft(peft.LoraConfig(**spec.to_peft())) == spec
