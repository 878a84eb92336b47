"""`save` and `load` of every method: whatever tensors a form has, they come back to the bit, and training goes on as if
it had never stopped.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from zoo.sealing import resealed

import lrcompile
from lrcompile import AdapterError, SpecError
from lrcompile.attaching import attach
from lrcompile.checkpointing.files import CONFIG, OURS, WEIGHTS
from lrcompile.matching import match
from lrcompile.recipes import recipe
from lrcompile.state import adapter_set, state_of

FIELDS: dict[str, dict[str, Any]] = {
    "adalora": {"target_rank": 1, "total_steps": 9},
    "bitfit": {},
    "delta-lora": {"start_step": 1, "ratio": 0.5},
    "galore": {"update_proj_gap": 2},
    "ia3": {"feedforward": ["2"]},
    "lora-sb": {"first_lr": 0.1},
    "lora-drop": {"warmup_steps": 2, "threshold": 0.5},
    "loftq": {"compute_dtype": "float32", "iterations": 2},
    "plora": {"period": 2, "momentum": 0.5},
    "q-galore": {"update_proj_gap": 2},
    "qlora": {"compute_dtype": "float32"},
    "qpissa": {"compute_dtype": "float32", "iterations": 2},
}
"""What a method needs beside targets and rank."""
PAIRS = ("lora", "rslora", "lora+", "qlora", "lora-fa", "lora-one", "eva", "lora-pro", "lora-rite", "qpissa", "loftq")
PEFTS = {**dict.fromkeys((*PAIRS, "dora"), "LORA"), "vera": "VERA", "adalora": "ADALORA", "ia3": "IA3", "hira": "HIRA"}
METHODS = lrcompile.methods()
QUANTIZING = [name for name in METHODS if recipe(name).quantizes_base]
CHOSEN_CODES = [name for name in QUANTIZING if recipe(name).nf4 is not None]
ADDING = [name for name in METHODS if recipe(name).form is not None]


class Block(nn.Module):
    """Linear maps in → out that differ, one of them used for two widths, with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(9, 13), nn.Tanh(), nn.Linear(13, 9), nn.Tanh(), nn.Linear(9, 13))
        self.head = nn.Linear(13, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x))


def linear() -> nn.Module:
    torch.manual_seed(0)
    return Block().eval()


def conv1d() -> nn.Module:
    utils = pytest.importorskip("transformers.pytorch_utils")
    torch.manual_seed(0)
    return nn.Sequential(utils.Conv1D(13, 9), nn.Tanh(), utils.Conv1D(5, 13)).eval()


def embedding() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 7, padding_idx=3), nn.Linear(7, 5)).eval()


KINDS: dict[str, tuple[Callable[[], nn.Module], Any, Tensor]] = {
    "linear": (linear, r"layers\.\d", torch.linspace(-2, 2, 4 * 9).reshape(4, 9)),
    "Conv1D": (conv1d, ["0", "2"], torch.linspace(-2, 2, 4 * 9).reshape(4, 9)),
    "embedding": (embedding, ["0", "1"], torch.arange(10).reshape(2, 5)),
}


def spec_of(method: str, targets: Any = KINDS["linear"][1], **more: Any) -> lrcompile.Spec:
    fields: dict[str, Any] = FIELDS.get(method, {}) | {"targets": targets} | more
    if recipe(method).lacks.get("rank") is None:
        fields = {"rank": 2, "seed": 5} | fields
    return lrcompile.spec(method, **fields)


def adapted(method: str, kind: str = "linear", name: str = "default", seed: int = 1, **more: Any) -> nn.Module:
    """A model whose adapter does something: every tensor of it is random, whether it trains or not."""
    build, targets, _ = KINDS[kind]
    return filled(started(build(), spec_of(method, targets, **more), name), name, seed)


def started(model: nn.Module, spec: lrcompile.Spec, name: str = "default") -> nn.Module:
    if recipe(spec.method).calibration is None:
        return lrcompile.apply(model, spec, name=name).eval()
    attach(model, spec, name, match(model, spec), started=False)  # what data would have said is of no matter here
    return model.eval()


def filled(model: nn.Module, name: str = "default", seed: int = 1) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    state = state_of(model)
    adapters = [adapter_set(model, site)[name] for site in state.sites[name]]
    tensors = [p for adapter in adapters for p in adapter.parameters()]
    tensors += [model.get_parameter(each) for each in state.trained.names_of(name)]
    with torch.no_grad():
        for tensor in {id(tensor): tensor for tensor in tensors}.values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / 2)
    for adapter in adapters:
        adapter.refresh()
    return lrcompile.activate(model, name, train=())


def out(model: nn.Module, x: Tensor = KINDS["linear"][2]) -> Tensor:
    with torch.no_grad():
        return model(x)


def base_for(method: str, model: nn.Module, kind: str = "linear") -> nn.Module:
    """The base an adapter of `model` is loaded into: with the same codes, where the method chose them."""
    if method not in CHOSEN_CODES:
        return KINDS[kind][0]()
    return lrcompile.remove(copy.deepcopy(model)).eval()


def everything(model: nn.Module) -> dict[str, Any]:
    return {
        "bits": {key: tensor.clone() for key, tensor in model.state_dict().items()},
        "identities": [id(p) for p in model.parameters()],
        "flags": {key: p.requires_grad for key, p in model.named_parameters()},
        "classes": [type(module) for module in model.modules()],
        "adapted": "_lrcompile" in model.__dict__,
    }


def same(before: dict[str, Any], after: dict[str, Any]) -> None:
    bits = (before["bits"], after["bits"])
    assert bits[0].keys() == bits[1].keys()
    assert all(torch.equal(bits[0][key], bits[1][key]) for key in bits[0])
    assert {k: v for k, v in before.items() if k != "bits"} == {k: v for k, v in after.items() if k != "bits"}


def refused(folder: Path, match: str, model: nn.Module | None = None) -> None:
    model = model or linear()
    before = everything(model)
    with pytest.raises(AdapterError, match=match):
        lrcompile.load(model, folder)
    same(before, everything(model))


# What was saved comes back


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_a_loaded_adapter_is_the_saved_one_to_the_bit(method: str, kind: str, tmp_path: Path):
    spec_of(method)
    try:
        model = adapted(method, kind)
    except (lrcompile.TargetError, SpecError) as error:
        pytest.skip(f"not for this model: {error}")
    lrcompile.save(model, tmp_path / "a")
    again = lrcompile.load(base_for(method, model, kind), tmp_path / "a").eval()
    x = KINDS[kind][2]
    assert torch.equal(out(again, x), out(model, x))
    bits = dict(again.state_dict())
    assert bits.keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert bits[key].dtype == tensor.dtype, key
        assert torch.equal(bits[key], tensor), key
    assert state_of(again).specs == state_of(model).specs
    assert not any(p.requires_grad for p in again.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_the_layout_is_pefts_where_peft_has_words_and_one_it_refuses_elsewhere(method: str, tmp_path: Path):
    lrcompile.save(adapted(method), tmp_path / "a")
    kind = json.loads((tmp_path / "a" / CONFIG).read_text())["peft_type"]
    assert kind == PEFTS.get(method, "LRCOMPILE")
    if kind == "LRCOMPILE":
        peft = pytest.importorskip("peft")
        with pytest.raises((KeyError, ValueError), match="LRCOMPILE"):
            peft.PeftModel.from_pretrained(linear(), tmp_path / "a")


@pytest.mark.parametrize("method", [name for name in ADDING if not recipe(name).writes_base])
def test_a_loaded_adapter_can_be_removed_to_the_bit(method: str, tmp_path: Path):
    model = adapted(method, bias="lora_only")
    lrcompile.save(model, tmp_path / "a")
    plain = base_for(method, model)
    before = everything(plain)
    lrcompile.load(plain, tmp_path / "a", trainable=True)
    lrcompile.remove(plain)
    if recipe(method).quantizes_base:
        before, now = (each["bits"] | {} for each in (before, everything(plain)))
        assert all(torch.equal(now[key], tensor) for key, tensor in before.items() if key in now)
    else:
        same(before, everything(plain))


@pytest.mark.parametrize("method", METHODS)
def test_only_what_the_method_trains_trains_and_only_on_request(method: str, tmp_path: Path):
    model = adapted(method, bias="all")
    lrcompile.save(model, tmp_path / "a")
    again = lrcompile.load(base_for(method, model), tmp_path / "a", trainable=True)
    lrcompile.activate(model, "default", train="default")
    assert {k for k, p in again.named_parameters() if p.requires_grad} == {
        k for k, p in model.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("method", METHODS)
def test_several_adapters_go_to_folders_and_come_back_side_by_side(method: str, tmp_path: Path):
    if method in CHOSEN_CODES or recipe(method).writes_base:
        pytest.skip("changes the base that another adapter stands on")
    model = adapted(method)
    first = out(model)
    second = out(filled(started(model, spec_of("lora"), "second"), "second", 3))
    lrcompile.save(model, tmp_path / "both")
    again = lrcompile.load(linear(), tmp_path / "both").eval()
    lrcompile.load(again, tmp_path / "both/second", "second")
    assert torch.equal(out(again), second)
    lrcompile.activate(again, "default")
    assert torch.equal(out(again), first)


@pytest.mark.parametrize("method", [each for each in ADDING if each != "q-galore"])  # which brings its weights along
def test_another_base_is_refused(method: str, tmp_path: Path):
    lrcompile.save(adapted(method), tmp_path / "a")
    other = linear()
    with torch.no_grad():
        other.get_parameter("layers.2.weight").view(-1)[5] += 1
    if recipe(method).quantizes_base and method not in CHOSEN_CODES:
        lrcompile.quantize(other, targets=r"layers\.\d")
    refused(tmp_path / "a", "float here" if method in CHOSEN_CODES else "layers.2 has other values", other)


# Codes that a method chose together with its factors


TAKING_NF4 = [name for name in ADDING if recipe(name).nf4 is None]


@pytest.mark.parametrize("method", TAKING_NF4)
def test_an_adapter_of_an_nf4_base_comes_back_there_and_on_no_other(method: str, tmp_path: Path):
    def nf4(seed: int = 0) -> nn.Module:
        plain = linear()
        with torch.no_grad():
            plain.get_parameter("layers.2.weight").add_(seed)
        return lrcompile.quantize(plain, targets=r"layers\.\d")

    model = filled(started(nf4(), spec_of(method)))
    lrcompile.save(model, tmp_path / "a")
    assert torch.equal(out(lrcompile.load(nf4(), tmp_path / "a").eval()), out(model))
    refused(tmp_path / "a", "layers.2 has other values", nf4(1))


FOLDING = [name for name in METHODS if "residual" in recipe(name).options]


@pytest.mark.parametrize("method", FOLDING)
def test_a_residual_in_the_weight_is_formed_anew(method: str, tmp_path: Path):
    model = adapted(method, residual="fold")
    lrcompile.activate(model, "default")  # the factors were filled behind its back
    lrcompile.save(model, tmp_path / "a")
    again = lrcompile.load(linear(), tmp_path / "a").eval()
    assert not torch.equal(again.get_parameter("layers.0.weight"), linear().get_parameter("layers.0.weight"))
    assert torch.equal(out(again), out(model))
    assert all(torch.equal(t, again.state_dict()[key]) for key, t in model.state_dict().items())
    lrcompile.remove(again)
    same(everything(linear()) | {"identities": 0}, everything(again) | {"identities": 0})


@pytest.mark.parametrize("method", CHOSEN_CODES)
def test_chosen_codes_are_recognised_and_no_others_are_taken(method: str, tmp_path: Path):
    lrcompile.save(adapted(method), tmp_path / "a")
    refused(tmp_path / "a", "chose together with it.*float here")
    spec = spec_of(method)
    usual = lrcompile.quantize(
        linear(), targets=r"layers\.\d", block_size=spec.block_size, double_quant=spec.double_quant
    )
    refused(tmp_path / "a", "other values", usual)


@pytest.mark.parametrize("method", ["lora", *CHOSEN_CODES])
def test_peft_is_not_sent_to_a_base_that_has_other_codes(method: str, tmp_path: Path):
    model = adapted(method)
    model.__dict__["name_or_path"] = "where/it/came/from"
    lrcompile.save(model, tmp_path / "a")
    named = json.loads((tmp_path / "a" / CONFIG).read_text()).get("base_model_name_or_path")
    assert named == (None if method in CHOSEN_CODES else "where/it/came/from")


@pytest.mark.parametrize("method", CHOSEN_CODES)
def test_the_way_the_refusal_names_works(method: str, tmp_path: Path):
    model = adapted(method)
    lrcompile.save(model, tmp_path / "a")
    codes = lrcompile.remove(copy.deepcopy(model)).state_dict()
    spec = spec_of(method)
    base = lrcompile.quantize(
        linear(),
        targets=r"layers\.\d",
        block_size=spec.block_size,
        double_quant=spec.double_quant,
        compute_dtype=spec.compute_dtype,
    )
    base.load_state_dict(codes)
    assert torch.equal(out(lrcompile.load(base, tmp_path / "a")), out(model))


# Shared tensors


def shared_pair(folder: Path) -> nn.Module:
    """Two sites of one width that share their pair, as LoRA-drop's do once it has chosen."""
    model = adapted("lora")
    first, second = (adapter_set(model, site)["default"] for site in state_of(model).sites["default"][::2])
    second.A, second.B = first.A, first.B
    lrcompile.save(model, folder)
    return model


def test_what_sites_share_is_written_once_and_comes_back_as_one_object(tmp_path: Path):
    model = shared_pair(tmp_path / "a")
    assert len(load_file(tmp_path / "a" / WEIGHTS)) == 4
    again = lrcompile.load(linear(), tmp_path / "a", trainable=True).eval()
    assert torch.equal(out(again), out(model))
    first, _, second = (adapter_set(again, site)["default"] for site in state_of(again).sites["default"])
    assert first.A is second.A
    assert first.B is second.B
    assert len([p for p in again.parameters() if p.requires_grad]) == 4


@pytest.mark.parametrize(
    "aliases",
    [
        {"adapter.layers.4.A": "adapter.layers.4.A"},
        {"adapter.layers.4.A": "adapter.layers.2.A"},  # another width
        {"adapter.layers.4.A": "adapter.layers.0.B"},
        {"adapter.layers.4.A": "adapter.nowhere.A"},
        {"adapter.layers.4.A": "base.head.weight"},
        {"adapter.nowhere.A": "adapter.layers.0.A"},
        {"adapter.layers.4.A": "adapter.layers.0.A", "adapter.layers.0.A": "adapter.layers.4.A"},
        {"adapter.layers.4.A": 3},
        ["adapter.layers.4.A"],
        {},
    ],
)
def test_aliases_that_cannot_be_are_refused(tmp_path: Path, aliases: Any):
    shared_pair(tmp_path / "a")
    edited(tmp_path / "a" / OURS, aliases=aliases)
    refused(tmp_path / "a", "aliases|cannot be shared|holds one tensor|missing keys")


def test_a_tensor_that_trains_is_not_shared_with_one_that_does_not(tmp_path: Path):
    lrcompile.save(adapted("pissa"), tmp_path / "a")
    rewritten(tmp_path / "a", lambda tensors: tensors.pop("adapter.layers.0.A0"))
    edited(tmp_path / "a" / OURS, aliases={"adapter.layers.0.A0": "adapter.layers.0.A"})
    refused(tmp_path / "a", "cannot be shared")


# Hostile and broken files


def edited(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in (data | changes).items() if value is not ...}))
    resealed(path.parent)


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    resealed(folder)


OWN = [name for name in ADDING if name not in PEFTS]


@pytest.mark.parametrize("method", OWN)
def test_every_tensor_must_be_there_in_its_shape_and_dtype(method: str, tmp_path: Path):
    folder = lrcompile.save(adapted(method), tmp_path / "a")
    original = load_file(folder / WEIGHTS)
    for key, tensor in original.items():
        for changed, said in (
            (original | {key: None}, "missing keys"),
            (original | {key: torch.zeros(*tensor.shape, 2, dtype=tensor.dtype)}, "wrong shapes"),
            (original | {key: tensor.to(torch.int16)}, "wrong dtypes"),
            (original | {f"{key}x": tensor.clone()}, "unknown keys"),
        ):
            save_file({k: v for k, v in changed.items() if v is not None}, folder / WEIGHTS)
            resealed(folder)
            refused(folder, said)


@pytest.mark.parametrize("method", OWN)
def test_a_value_that_is_not_finite_is_refused_by_name(method: str, tmp_path: Path):
    folder = lrcompile.save(adapted(method), tmp_path / "a")
    key = next(key for key, tensor in load_file(folder / WEIGHTS).items() if tensor.is_floating_point())
    rewritten(folder, lambda tensors: tensors[key].view(-1)[:1].fill_(float("nan")))
    refused(folder, key)


def test_a_truth_value_that_is_none_is_refused(tmp_path: Path):
    folder = lrcompile.save(adapted("delta-lora"), tmp_path / "a")
    key = next(key for key, tensor in load_file(folder / WEIGHTS).items() if tensor.dtype == torch.bool)
    data = (folder / WEIGHTS).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    offset = start + json.loads(data[8:start])[key]["data_offsets"][0]
    (folder / WEIGHTS).write_bytes(data[:offset] + b"\2" + data[offset + 1 :])
    resealed(folder)
    refused(folder, f"{key} hold truth values")


def test_our_layout_needs_the_file_that_describes_it(tmp_path: Path):
    folder = shared_pair_folder(tmp_path)
    (folder / OURS).unlink()
    refused(folder, OURS)
    folder = shared_pair_folder(tmp_path)
    edited(folder / CONFIG, alpha=50)
    refused(folder, OURS)


def shared_pair_folder(tmp_path: Path) -> Path:
    shared_pair(tmp_path / "a")
    return tmp_path / "a"


def test_a_method_that_pefts_layout_cannot_hold_is_refused_there(tmp_path: Path):
    folder = lrcompile.save(adapted("lora"), tmp_path / "a")
    for method in OWN:
        edited(folder / OURS, spec=spec_of(method).to_dict())
        refused(folder, f"{method} has no counterpart|is {method}, which keeps")


@pytest.mark.parametrize(
    "method", ["shared", *(m for m in ("delta-lora", "vera", "adalora", "ia3", "dora") if m in METHODS)]
)
@settings(deadline=None, max_examples=40, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from([WEIGHTS, CONFIG, OURS]), hostile=st.booleans())
def test_flipped_bits_are_a_typed_error_or_told_and_change_no_base(
    method: str, tmp_path: Path, data: st.DataObject, name: str, hostile: bool
):
    folder = tmp_path / "a"
    if not folder.exists():
        shared_pair(folder) if method == "shared" else lrcompile.save(adapted(method), folder)
    files = {each: (folder / each).read_bytes() for each in (CONFIG, OURS, WEIGHTS)}
    content = bytearray(files[name])
    size = 8 + int.from_bytes(content[:8], "little") if name == WEIGHTS else len(content)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, size - 1))] ^= 1 << data.draw(st.integers(0, 7))
    flipped = tmp_path / "flipped"
    flipped.mkdir(exist_ok=True)
    for each, bits in (files | {name: bytes(content)}).items():
        (flipped / each).write_bytes(bits)
    if hostile:
        resealed(flipped)
    model = linear()
    before = everything(model)
    try:
        lrcompile.load(model, flipped)
    except AdapterError:
        same(before, everything(model))
    else:
        told = name == CONFIG and "was not used" in str(lrcompile.report(model))
        assert hostile or told or bytes(content) == files[name]
        lrcompile.remove(model)
        same(before, everything(model))


# Training goes on


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> nn.Module:
    x = KINDS["linear"][2]
    for step in steps:
        optimizer.zero_grad()
        (model(x * (1 + step / 8)) - 1).square().mean().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("method", METHODS)
def test_training_goes_on_bit_for_bit_after_a_load(method: str, tmp_path: Path):
    model = started(linear(), spec_of(method))
    if recipe(method).calibration is not None:
        filled(model)
        lrcompile.activate(model, "default", train="default")
    base = base_for(method, model)
    cls: Any = getattr(lrcompile, "LoraRite", None) if method == "lora-rite" else torch.optim.AdamW
    optimizer = lrcompile.optimizer(model, cls, lr=1e-2)
    trained(model, optimizer, range(3))
    lrcompile.save(model, tmp_path / "a")
    saved = copy.deepcopy(optimizer.state_dict())
    trained(model, optimizer, range(3, 7))
    again = lrcompile.load(base, tmp_path / "a", trainable=True).eval()
    resumed = lrcompile.optimizer(again, cls, lr=1e-2)
    resumed.load_state_dict(saved)
    trained(again, resumed, range(3, 7))
    expected, found = model.state_dict(), again.state_dict()
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
