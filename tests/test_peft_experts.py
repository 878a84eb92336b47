"""Stacks of expert weights in the three layouts that PEFT has written them in.

What the versions write was seen with PEFT 0.18.1, 0.19.0, 0.19.1 and 0.21.2 themselves: `turned` makes the older
layouts of the newest, whose own PEFT is the oracle here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lrcompile
from lrcompile import AdapterError

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

E, RANK, HIDDEN = 3, 2, 12
IDS = torch.arange(10).reshape(2, 5)
SIZES = {
    "vocab_size": 31,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": E,
    "num_experts_per_tok": 2,
    "attn_implementation": "eager",
    "experts_implementation": "eager",
}


def plain(inside: int) -> nn.Module:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, intermediate_size=inside))


def transposed(inside: int) -> nn.Module:
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**SIZES, head_dim=6, intermediate_size=inside))


def base(build: Callable[[int], nn.Module], inside: int) -> Any:
    torch.manual_seed(0)
    model: Any = build(inside).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) / 3)
    return model


def out(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def saved(model: nn.Module, folder: Path, parameters: list[str]) -> Tensor:
    """A folder of PEFT's with random factors; the outputs."""
    config = peft.LoraConfig(r=RANK, lora_alpha=4, target_modules=["q_proj"], target_parameters=parameters)
    theirs = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) / 2)
    theirs.save_pretrained(folder)
    return out(theirs.eval())


def turned(folder: Path, version: str | None) -> None:
    """The stacks as the factors of the transposed maps: A'ₑ = Bₑᵀ, B'ₑ = Aₑᵀ, experts slowest in A, fastest in B."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    for key in [key for key in tensors if ".experts." in key and "lora_A" in key]:
        other = key.replace("lora_A", "lora_B")
        A, B = tensors[key].unflatten(0, (E, RANK)), tensors[other].unflatten(1, (RANK, E))
        tensors[key] = torch.cat([B[:, :, e].t() for e in range(E)]).contiguous()
        tensors[other] = torch.stack([A[e].t() for e in range(E)], -1).flatten(1).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    versioned(folder, version)


def versioned(folder: Path, version: str | None) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["peft_version"] = version
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("inside", [20, HIDDEN])
@pytest.mark.parametrize(
    ("build", "version", "turns"),
    [
        (plain, "0.17.1", True),
        (plain, "0.18.1", True),
        (plain, "0.19.0", True),
        (plain, "0.19.1", False),
        (plain, "0.21.2.dev0@abc", False),
        (transposed, "0.18.1", False),
        (transposed, "0.19.0", True),
        (transposed, "0.19.1", False),
    ],
)
def test_a_folder_of_any_version_means_what_it_meant_there(
    build: Any, version: str, turns: bool, inside: int, tmp_path: Path
):
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    expected = saved(base(build, inside), tmp_path, parameters)
    (turned if turns else versioned)(tmp_path, version)
    found = out(lrcompile.load(base(build, inside), tmp_path))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


@pytest.mark.parametrize("turns", [False, True])
def test_shapes_that_allow_one_reading_need_no_version(turns: bool, tmp_path: Path):
    expected = saved(base(plain, 20), tmp_path, ["experts.down_proj"])
    (turned if turns else versioned)(tmp_path, None)
    found = out(lrcompile.load(base(plain, 20), tmp_path))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


@pytest.mark.parametrize("version", [None, "", "mine", 19])
def test_square_stacks_of_an_unknown_version_are_refused_and_the_model_left_alone(version: Any, tmp_path: Path):
    saved(base(plain, HIDDEN), tmp_path, ["experts.down_proj"])
    versioned(tmp_path, version)
    model = base(plain, HIDDEN)
    with pytest.raises(AdapterError, match="add the version that wrote this adapter"):
        lrcompile.load(model, tmp_path)
    assert torch.equal(out(model), out(base(plain, HIDDEN)))


def test_a_folder_of_ours_says_how_it_is_read(tmp_path: Path):
    saved(base(plain, HIDDEN), tmp_path / "theirs", ["experts.down_proj"])
    ours = lrcompile.load(base(plain, HIDDEN), tmp_path / "theirs")
    lrcompile.save(ours, tmp_path / "ours")
    assert torch.equal(out(lrcompile.load(base(plain, HIDDEN), tmp_path / "ours")), out(ours))
    (tmp_path / "ours" / "lrcompile.json").unlink()
    assert torch.equal(out(lrcompile.load(base(plain, HIDDEN), tmp_path / "ours")), out(ours))
    again = peft.PeftModel.from_pretrained(base(plain, HIDDEN), tmp_path / "ours", autocast_adapter_dtype=False)
    torch.testing.assert_close(out(again.eval()), out(ours), rtol=0, atol=1e-12 * float(out(ours).abs().max()))


def test_shapes_of_no_layout_are_the_error_of_any_wrong_shape(tmp_path: Path):
    saved(base(plain, 20), tmp_path, ["experts.down_proj"])
    with pytest.raises(AdapterError, match="wrong shapes"):
        lrcompile.load(base(plain, 16), tmp_path)
