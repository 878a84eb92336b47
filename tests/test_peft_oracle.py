"""PEFT as oracle: for identical tensors, outputs and gradients are identical, whichever of the two wrote the folder.

Not for `nn.MultiheadAttention` as a module: PEFT 0.21 applies the update of `out_proj` twice there (`test_attention…`
holds it to that).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lrcompile
from lrcompile.interop.peft_fitting import by_parameter
from lrcompile.interop.peft_keys import base_key, base_name, pack, places, slots_by_host
from lrcompile.state import adapter_set, state_of
from lrcompile.verifying.strictjson import read_object

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = {"vocab_size": 31, "hidden_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2}


class Raw(nn.Module):
    """Two raw matrices on one module, one of them stored `[in, out]`, below a module that is adapted too."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(9, 7) / 3)
        self.down = nn.Parameter(torch.randn(9, 5) / 3)
        self.bias = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.up.t()) @ self.down + self.bias


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 7, padding_idx=3)
        self.raw = Raw()
        self.norm = nn.LayerNorm(5)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 5)) for _ in range(3)])
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.raw(self.emb(x)))
        for layer in self.layers:
            y = y + layer(y)
        return self.head(y)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x)[0]


def llama() -> nn.Module:
    sizes = SIZES | {"intermediate_size": 20, "num_key_value_heads": 1, "attn_implementation": "eager"}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))


def gpt2() -> nn.Module:
    sizes = {"vocab_size": 31, "n_embd": 12, "n_layer": 2, "n_head": 2, "attn_implementation": "eager"}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))


def experts() -> nn.Module:
    sizes = SIZES | {
        "intermediate_size": 20,
        "num_key_value_heads": 1,
        "num_local_experts": 3,
        "attn_implementation": "eager",
    }
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, experts_implementation="eager"))


def transposed_experts() -> nn.Module:
    sizes = SIZES | {
        "intermediate_size": 20,
        "num_key_value_heads": 1,
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "head_dim": 6,
    }
    return transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**sizes, experts_implementation="eager", attn_implementation="eager")
    )


def ids(size: int = 31) -> Tensor:
    return torch.arange(10).reshape(2, 5) * 7 % size


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    config: dict[str, Any]
    inputs: Callable[[], Tensor] = ids


CASES = {
    "linear": Case(llama, {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "all-linear": Case(llama, {"target_modules": "all-linear"}),
    "a regular expression": Case(llama, {"target_modules": r".*\.mlp\.(up|gate)_proj"}),
    "rank-stabilised": Case(llama, {"target_modules": ["k_proj"], "use_rslora": True}),
    "patterns": Case(
        llama,
        {
            "target_modules": ["q_proj", "up_proj"],
            "rank_pattern": {"q_proj": 8, r"1\.mlp\.up_proj": 2},
            "alpha_pattern": {"up_proj": 7},
        },
    ),
    "some layers": Case(llama, {"target_modules": ["o_proj", "q_proj"], "layers_to_transform": [0, 2]}),
    "layers by pattern": Case(
        llama, {"target_modules": ["o_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}
    ),
    "excluded": Case(llama, {"target_modules": ["q_proj", "o_proj"], "exclude_modules": ["1.self_attn.q_proj"]}),
    "modules trained in full": Case(llama, {"target_modules": ["q_proj"], "modules_to_save": ["norm", "absent_here"]}),
    "lm_head in full": Case(llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "Conv1D": Case(gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "Conv1D and its biases": Case(gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "lora_only"}),
    "embedding": Case(Mixed, {"target_modules": ["emb", "head"]}, lambda: ids(11)),
    "all biases": Case(
        Mixed, {"target_modules": r"layers\.\d\.0", "bias": "all", "modules_to_save": ["head"]}, lambda: ids(11)
    ),
    "biases of adapted maps": Case(Mixed, {"target_modules": ["0.0", "head"], "bias": "lora_only"}, lambda: ids(11)),
    "raw matrices": Case(Mixed, {"target_modules": [], "target_parameters": ["raw.up", "raw.down"]}, lambda: ids(11)),
    "raw and modules": Case(
        Mixed, {"target_modules": ["0.2"], "target_parameters": ["raw.down"], "bias": "all"}, lambda: ids(11)
    ),
    "a linear by its parameter": Case(
        Mixed, {"target_modules": [], "target_parameters": ["head.weight"]}, lambda: ids(11)
    ),
    "experts": Case(
        experts, {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    ),
    "one weight of the experts": Case(experts, {"target_modules": [], "target_parameters": ["experts.down_proj"]}),
    "transposed experts": Case(
        transposed_experts, {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    ),
    "the packed projection of an attention": Case(
        Attention, {"target_modules": [], "target_parameters": ["attn.in_proj_weight"]}, lambda: torch.randn(2, 5, 8)
    ),
}


def base_of(case: Case, dtype: torch.dtype) -> Any:
    torch.manual_seed(1)
    return case.build().to(dtype).eval()


def oracle(case: Case, dtype: torch.dtype) -> Any:
    """PEFT's model (its scales exact in float32, as ours are held) with every adapter tensor, and every tensor
    trained in full, at random.
    """
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 5} | case.config)
    model = peft.get_peft_model(base_of(case, dtype), config, autocast_adapter_dtype=False).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return model


def out(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return y if isinstance(y, Tensor) else y.logits


def inputs_of(case: Case, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(3)
    x = case.inputs()
    return x.to(dtype) if x.is_floating_point() else x


def close(ours: Tensor, theirs: Tensor) -> None:
    """Two orders of summation over a few tens of products, through a few layers."""
    bound = 256 * torch.finfo(theirs.dtype).eps * theirs.abs().max().clamp(min=1e-3)
    assert ours.dtype == theirs.dtype
    assert (ours - theirs).abs().max() <= bound


def our_gradients(model: nn.Module, folder: Path) -> dict[str, Tensor | None]:
    state = state_of(model)
    units = by_parameter(read_object(folder / "adapter_config.json"), state.sites["default"])
    found: dict[str, Tensor | None] = {}
    for place in places(model, units):
        adapter = adapter_set(model, place.unit.site)["default"]
        packed = pack(place, {"A": adapter.A.grad, "B": adapter.B.grad})
        found |= {key: packed[tensor] for tensor, key in place.keys.items()}
    for parameter in state.trained.names_of("default"):
        found[base_key(slots_by_host(units), parameter)] = model.get_parameter(parameter).grad
    return found


def their_gradients(model: Any) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "original_module" not in name:
            trained = "modules_to_save" in name
            found[f"base_model.model.{base_name(name)}" if trained else name] = parameter.grad
    return {key.replace(".default", ""): gradient for key, gradient in found.items()}


def weighted(y: Tensor) -> Tensor:
    torch.manual_seed(4)
    return (y * torch.randn_like(y)).sum()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_folder_of_peft_gives_its_outputs_and_gradients(case: Case, dtype: torch.dtype, tmp_path: Path):
    theirs, x = oracle(case, dtype), inputs_of(case, dtype)
    y = out(theirs, x)
    weighted(y).backward()
    theirs.save_pretrained(tmp_path)
    ours = lrcompile.load(base_of(case, dtype), tmp_path, trainable=True)
    mine = out(ours, x)
    close(mine, y)
    assert (out(base_of(case, dtype), x) - y).abs().max() > 1e-3  # the adapter does something
    weighted(mine).backward()
    expected, found = their_gradients(theirs), our_gradients(ours, tmp_path)
    assert set(found) == set(expected)
    for key, gradient in expected.items():
        mine_too = found[key]
        assert mine_too is not None, key
        close(mine_too, gradient)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_folder_of_ours_gives_peft_the_same_outputs(case: Case, tmp_path: Path):
    theirs, x = oracle(case, torch.float64), inputs_of(case, torch.float64)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lrcompile.load(base_of(case, torch.float64), tmp_path / "theirs")
    lrcompile.save(ours, tmp_path / "ours")
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        again = peft.PeftModel.from_pretrained(
            base_of(case, torch.float64), tmp_path / "ours", autocast_adapter_dtype=False
        )
    assert not [w for w in raised if "key" in str(w.message).lower() or "Unexpected" in str(w.message)]
    close(out(again.eval(), x), out(ours, x))
    close(out(again, x), out(theirs, x))
    written, read = (
        load_file(tmp_path / "ours/adapter_model.safetensors"),
        load_file(tmp_path / "theirs/adapter_model.safetensors"),
    )
    assert all(torch.equal(tensor, read[key]) for key, tensor in written.items())
    assert {
        key for key in set(read) - set(written) if "modules_to_save" not in key and "original_module" not in key
    } == set()


def test_where_the_scale_is_a_power_of_two_the_bits_are_pefts(tmp_path: Path):
    case = Case(Mixed, {"target_modules": ["head", "emb"], "r": 4, "lora_alpha": 8}, lambda: ids(11))
    theirs, x = oracle(case, torch.float32), inputs_of(case, torch.float32)
    theirs.save_pretrained(tmp_path)
    assert torch.equal(out(lrcompile.load(base_of(case, torch.float32), tmp_path), x), out(theirs, x))


def test_an_attention_gets_the_update_of_out_proj_once_and_peft_applies_it_twice(tmp_path: Path):
    case = Case(Attention, {"target_modules": ["attn"]}, lambda: torch.randn(2, 5, 8))
    theirs, x = oracle(case, torch.float64), inputs_of(case, torch.float64)
    y = out(theirs, x)
    theirs.save_pretrained(tmp_path)
    ours = lrcompile.load(base_of(case, torch.float64), tmp_path)
    assert any("twice" in note for note in lrcompile.report(ours).notes)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    delta = {
        name: tensors[f"base_model.model.{name}.lora_B.weight"]
        @ tensors[f"base_model.model.{name}.lora_A.weight"]
        * 5
        / 4
        for name in ("attn", "attn.base_layer.out_proj")
    }
    plain = base_of(case, torch.float64)
    with torch.no_grad():
        plain.attn.in_proj_weight += delta["attn"]
        plain.attn.out_proj.weight += delta["attn.base_layer.out_proj"]
        close(out(ours, x), out(plain, x))
        plain.attn.out_proj.weight += delta["attn.base_layer.out_proj"]
        close(y, out(plain, x))
    lrcompile.save(ours, tmp_path / "ours")
    again = load_file(tmp_path / "ours/adapter_model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)


def test_what_peft_writes_of_a_targeted_embedding_is_checked_against_the_base(tmp_path: Path):
    case = Case(llama, {"target_modules": ["embed_tokens", "q_proj"]})
    theirs, x = oracle(case, torch.float32), inputs_of(case, torch.float32)
    theirs.save_pretrained(tmp_path)
    assert any("embed_tokens.base_layer.weight" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    close(out(lrcompile.load(base_of(case, torch.float32), tmp_path), x), out(theirs, x))
    other = base_of(case, torch.float32)
    with torch.no_grad():
        other.model.embed_tokens.weight[5, 2] += 1
    with pytest.raises(lrcompile.AdapterError, match=r"embed_tokens\.base_layer\.weight"):
        lrcompile.load(other, tmp_path)


class Wide(nn.Module):
    """An attention whose keys and values have widths of their own: PEFT reaches it by its parameters only."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, kdim=6, vdim=5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x[..., :6], x[..., 1:6], need_weights=False)[0]


@pytest.mark.parametrize(
    ("build", "fields", "x"),
    [
        (Mixed, {"targets": "all-linear", "exclude": ["head"], "dropout": 0.5, "rank_pattern": {r"1\.0": 2}}, ids(11)),
        (Mixed, {"targets": r"layers\.\d\.[02]", "layers": [1, 2], "exclude": ["2.0"]}, ids(11)),
        (
            Wide,
            {"targets": ["q_proj_weight", "v_proj_weight", "k_proj_weight"], "rank_pattern": {"k_proj_weight": 2}},
            8,
        ),
        (experts, {"targets": "all-linear", "dropout": 0.25, "alpha_pattern": {"down_proj": 2}}, ids()),
        (llama, {"targets": "all-linear", "layers": [1], "bias": "all", "train_modules": ["norm"]}, ids()),
        (gpt2, {"targets": "all-linear", "alpha_pattern": {r"0\.attn\.c_proj": 3}}, ids()),
    ],
    ids=["raw and linear", "layers", "wide attention", "experts", "llama", "Conv1D"],
)
def test_what_was_applied_here_is_the_same_in_peft(build: Any, fields: dict[str, Any], x: Any, tmp_path: Path):
    x = torch.randn(2, 5, x, dtype=torch.float64) if isinstance(x, int) else x
    case = Case(build, {})
    model = lrcompile.apply(base_of(case, torch.float64), lrcompile.spec("lora", rank=4, alpha=5, **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    lrcompile.save(model.eval(), tmp_path)
    theirs = peft.PeftModel.from_pretrained(base_of(case, torch.float64), tmp_path, autocast_adapter_dtype=False)
    close(out(theirs.eval(), x), out(model, x))
    (tmp_path / "lrcompile.json").unlink()
    close(out(lrcompile.load(base_of(case, torch.float64), tmp_path), x), out(model, x))


def test_several_adapters_are_where_peft_looks_for_them(tmp_path: Path):
    model = base_of(CASES["linear"], torch.float64)
    x = ids()
    outputs = {}
    for name, targets in {"default": ["q_proj"], "second": ["v_proj", "up_proj"]}.items():
        lrcompile.apply(model, lrcompile.spec("lora", rank=2, targets=targets), name=name)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_()
        outputs[name] = out(model.eval(), x)
    lrcompile.save(model, tmp_path / "both")
    theirs = peft.PeftModel.from_pretrained(
        base_of(CASES["linear"], torch.float64), tmp_path / "both", autocast_adapter_dtype=False
    )
    theirs.load_adapter(tmp_path / "both/second", "second", autocast_adapter_dtype=False)
    for name, expected in outputs.items():
        theirs.set_adapter(name)
        close(out(theirs.eval(), x), expected)


def test_a_model_of_peft_is_refused_with_advice(tmp_path: Path):
    theirs = oracle(CASES["linear"], torch.float32)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(lrcompile.AdapterError, match="unload"):
        lrcompile.load(theirs, tmp_path)
