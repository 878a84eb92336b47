"""`save` and `load`: what was saved comes back to the bit; what is wrong is one typed error that
leaves model and files as before.
"""

from __future__ import annotations

import copy
import errno
import json
import os
import pickle
import struct
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
from lrcompile import AdapterError
from lrcompile.safe_tensors import open_tensors
from lrcompile.state import state_of

BODY = "base_model.model.body.base_layer"  # a raw parameter of `body` itself is adapted, so PEFT wraps it
WEIGHTS, CONFIG, OURS = "adapter_model.safetensors", "adapter_config.json", "lrcompile.json"


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 7)
        self.mix = nn.Parameter(torch.randn(7, 9) / 3)
        self.up, self.down = nn.Linear(9, 13), nn.Linear(13, 7)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fit = nn.Linear(7, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fit(self.down(torch.tanh(self.up(self.emb(x) @ self.mix))))
        return self.attn(y, y, y, need_weights=False)[0]


class Model(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.norm, self.head = Body(), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(x)))


X = torch.arange(10).reshape(2, 5) % 11
FIELDS = {
    "rank": 3,
    "alpha": 5,
    "dropout": 0.125,
    "targets": ["emb", "mix", "up", "down", "in_proj_weight", "out_proj"],
    "rank_pattern": {"up": 5},
    "alpha_pattern": {"emb": 2},
    "train_modules": ["head"],
    "bias": "lora_only",
    "init": "gaussian",
    "seed": 7,
}


def adapted(model: nn.Module | None = None, name: str = "default", seed: int = 1, **fields: Any) -> nn.Module:
    """A model whose adapter does something: every tensor it trains is random.

    Frozen, because torch picks other kernels where gradients are wanted.
    """
    model = model or Model()
    lrcompile.apply(model, lrcompile.spec("lora", **FIELDS | fields), name=name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return lrcompile.activate(model, name, train=()).eval()


def out(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(X)


ALONE: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}, "train_modules": [], "bias": "none"}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return lrcompile.save(adapted(), tmp_path / "adapter")


def everything(model: nn.Module) -> dict[str, Any]:
    """All that `load` must leave alone when it fails."""
    return {
        "bits": {key: tensor.clone() for key, tensor in model.state_dict().items()},
        "identities": [id(p) for p in model.parameters()],
        "flags": {key: p.requires_grad for key, p in model.named_parameters()},
        "classes": [type(module) for module in model.modules()],
        "state": {
            key: repr(value) for key, value in vars(model.__dict__.get("_lrcompile", Model)).items() if key != "trained"
        }
        if "_lrcompile" in model.__dict__
        else None,
        "random": torch.get_rng_state(),
    }


def same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before["bits"].keys() == after["bits"].keys()
    assert all(torch.equal(before["bits"][key], after["bits"][key]) for key in before["bits"])
    assert torch.equal(before["random"], after["random"])
    for key in ("identities", "flags", "classes", "state"):
        assert before[key] == after[key], key


def refused(folder: Path, match: str, model: nn.Module | None = None, **more: Any) -> None:
    """One `AdapterError` that says `match`, the model as it was."""
    model = model or Model()
    before = everything(model)
    with pytest.raises(AdapterError, match=match):
        lrcompile.load(model, folder, **more)
    same(before, everything(model))


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    resealed(folder)


def edited(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in (data | changes).items() if value is not ...}))
    resealed(path.parent)


# What was saved comes back


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_a_loaded_adapter_is_the_saved_one_to_the_bit(tmp_path: Path, dtype: str):
    model = adapted(dtype=dtype)
    lrcompile.save(model, tmp_path / "a")
    again = lrcompile.load(Model(), tmp_path / "a").eval()
    assert torch.equal(out(again), out(model))
    expected, found = dict(model.state_dict()), dict(again.state_dict())
    assert found.keys() == expected.keys()
    assert all(found[key].dtype == tensor.dtype and torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert state_of(again).specs == state_of(model).specs
    assert not any(parameter.requires_grad for parameter in again.parameters())


def test_a_loaded_adapter_trains_only_on_request_and_can_be_removed_to_the_bit(saved: Path):
    model = Model()
    before = everything(model)
    lrcompile.load(model, saved, trainable=True)
    training = {key for key, p in model.named_parameters() if p.requires_grad}
    assert {"head.weight", "head.bias", "body.up.bias"} < training
    assert not {"norm.weight", "body.up.weight"} & training
    lrcompile.remove(model)
    same(before | {"random": torch.get_rng_state()}, everything(model))


def test_loading_draws_no_random_numbers(saved: Path):
    before = torch.get_rng_state()
    model = Model()
    torch.set_rng_state(before)
    lrcompile.load(model, saved)
    assert torch.equal(torch.get_rng_state(), before)


def test_saving_while_merged_writes_the_factors(tmp_path: Path):
    model = adapted()
    lrcompile.save(model, tmp_path / "before")
    lrcompile.merge(model)
    lrcompile.save(model, tmp_path / "merged")
    for name in (WEIGHTS, CONFIG, OURS):
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()


def test_saving_while_another_adapter_is_active_writes_the_named_one(tmp_path: Path):
    model = adapted()
    lrcompile.save(model, tmp_path / "alone")
    adapted(model, "second", seed=5)
    lrcompile.save(model, tmp_path / "named", "default")
    assert (tmp_path / "named" / WEIGHTS).read_bytes() == (tmp_path / "alone" / WEIGHTS).read_bytes()
    assert not (tmp_path / "named/second").exists()


def test_several_adapters_go_to_folders_and_come_back_side_by_side(tmp_path: Path):
    model = adapted()
    first = out(model)
    second = out(adapted(model, "second", seed=5, **ALONE | {"targets": ["up"], "train_modules": ["head"]}))
    lrcompile.save(model, tmp_path / "both")
    again = lrcompile.load(Model(), tmp_path / "both").eval()
    lrcompile.load(again, tmp_path / "both/second", "second")
    assert torch.equal(out(again), second)
    lrcompile.activate(again, "default")
    assert torch.equal(out(again), first)


def test_an_adapter_of_a_quantized_base_is_lora_to_peft_and_qlora_to_us(tmp_path: Path):
    fields = {"rank": 2, "targets": ["up", "down"], "compute_dtype": "float32", "seed": 1}
    model = lrcompile.apply(Model(), lrcompile.spec("qlora", **fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    lrcompile.save(model, tmp_path / "a")
    assert json.loads((tmp_path / "a" / CONFIG).read_text())["peft_type"] == "LORA"
    again = lrcompile.load(Model(), tmp_path / "a").eval()
    assert torch.equal(out(again), out(model))
    assert state_of(again).specs["default"].method == "qlora"
    assert any("another form" in note for note in lrcompile.report(again).notes)
    lrcompile.load(again, tmp_path / "a", replace=True)  # now the codes themselves are compared
    assert torch.equal(out(again), out(model))


def test_a_cast_base_is_told_but_not_refused(saved: Path):
    model = lrcompile.load(Model().bfloat16(), saved)
    assert any("float32, here bfloat16" in note for note in lrcompile.report(model).notes)


def test_a_rank_above_the_most_there_can_be_is_told(tmp_path: Path):
    lrcompile.save(adapted(**ALONE | {"targets": ["head"], "rank_pattern": {"head": 5}}), tmp_path / "a")
    assert any("rank 5 is above 3" in note for note in lrcompile.report(lrcompile.load(Model(), tmp_path / "a")).notes)


def test_an_adapter_comes_back_on_a_captured_graph(tmp_path: Path):
    plain = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    x = torch.randn(4, 5)
    graph = torch.export.export(copy.deepcopy(plain), (x,)).module()
    model = lrcompile.apply(plain, lrcompile.spec("lora", rank=2, targets=["0", "2"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    lrcompile.save(model, tmp_path / "a")
    lrcompile.load(graph, tmp_path / "a")
    torch.testing.assert_close(graph(x), model(x))
    lrcompile.save(graph, tmp_path / "b")
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()


# Names and replacement


def test_a_name_in_use_is_an_error_and_replace_takes_its_place(saved: Path):
    model = adapted(seed=9, rank=2, targets=["up", "fit"], rank_pattern={}, alpha_pattern={}, train_modules=["norm"])
    refused(saved, "replace=True", model)
    lrcompile.load(model, saved, replace=True)
    assert torch.equal(out(model), out(adapted()))
    assert list(state_of(model).specs) == ["default"]
    assert not any("fit.lrcompile" in key for key in model.state_dict())
    lrcompile.remove(model)
    assert all(torch.equal(tensor, Model().state_dict()[key]) for key, tensor in model.state_dict().items())


def test_replacing_leaves_other_adapters_alone(saved: Path):
    model = adapted()
    second = out(adapted(model, "second", seed=5, train_modules=[], bias="none"))
    lrcompile.load(model, saved, replace=True)
    assert dict(state_of(model).active) == {"default": 1.0}
    assert torch.equal(out(model), out(adapted()))
    lrcompile.activate(model, "second")
    assert torch.equal(out(model), second)


def test_a_replacement_that_fails_leaves_the_old_adapter(saved: Path, monkeypatch: pytest.MonkeyPatch):
    model = adapted(seed=9)
    lrcompile.activate(model, {"default": 0.5}, train="default")
    expected, before = out(model), everything(model)
    monkeypatch.setattr("lrcompile.trained.Trained.write", lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
    with pytest.raises(MemoryError):
        lrcompile.load(model, saved, replace=True)
    assert torch.equal(out(model), expected)
    same(before | {"random": torch.get_rng_state()}, everything(model))


def test_a_merged_model_takes_no_adapter(saved: Path):
    model = adapted()
    lrcompile.merge(model)
    expected = out(model)
    with pytest.raises(lrcompile.MergeError, match="unmerge"):
        lrcompile.load(model, saved, "other")
    assert torch.equal(out(model), expected)


@pytest.mark.parametrize("name", ["a.b", "", "-x", "forward", "a b"])
def test_a_name_that_cannot_be_is_refused(saved: Path, name: str):
    refused(saved, "adapter name", name=name)


# Other bases


def test_an_adapter_for_another_base_names_what_differs(saved: Path):
    refused(saved, r"another base.*body\.up has other values", Model(seed=3))
    wider = Model()
    wider.body.up, wider.body.down = nn.Linear(9, 15), nn.Linear(15, 7)
    refused(saved, r"body\.up is \[13, 9\] in its base and \[15, 9\] here", wider)
    fewer = Model()
    fewer.body.up = nn.Identity()  # type: ignore[assignment]
    refused(saved, "cannot be used.*up", fewer)


def test_sites_that_are_here_and_not_there_are_named(tmp_path: Path):
    lrcompile.save(adapted(**ALONE | {"targets": "all-linear"}), tmp_path / "a")
    more = Model()
    more.body.extra = nn.Linear(3, 4)
    refused(tmp_path / "a", r"hit body\.extra here", more)


def test_weights_too_many_to_hash_whole_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lrcompile.checkpointing.base_print.WHOLE", 100)
    lrcompile.save(adapted(), tmp_path / "a")
    assert json.loads((tmp_path / "a" / OURS).read_text())["base"]["sampled"] is True
    lrcompile.load(Model(), tmp_path / "a")
    refused(tmp_path / "a", "other values", Model(seed=3))


def test_an_adapter_of_peft_alone_goes_by_shapes(saved: Path):
    (saved / OURS).unlink()
    model = lrcompile.load(Model(seed=3), saved)
    assert state_of(model).specs["default"].rank_pattern == {"up": 5}


def test_a_config_that_something_else_wrote_since_is_the_truth(saved: Path):
    edited(saved / CONFIG, lora_alpha=50)
    model = lrcompile.load(Model(seed=3), saved)
    assert state_of(model).specs["default"].alpha == 50
    assert any(OURS in note for note in lrcompile.report(model).notes)


def test_values_in_another_dtype_than_the_base_are_told(saved: Path):
    rewritten(saved, lambda tensors: tensors.update({key: t.double() for key, t in tensors.items() if "head" in key}))
    model = lrcompile.load(Model(), saved)
    assert any("head.weight" in note and "float64" in note for note in lrcompile.report(model).notes)


def test_the_state_of_another_adapter_is_no_tensor_of_the_base(saved: Path):
    model = adapted(name="other")
    key = "base_model.model.body.up.lrcompile_adapters.weight.other.A"
    rewritten(
        saved,
        lambda tensors: tensors.update({key: model.get_parameter(key.removeprefix("base_model.model.")).detach()}),
    )
    refused(saved, "unknown keys", model, name="new")


def test_a_base_without_memory_is_refused(saved: Path):
    with torch.device("meta"):
        model = Model()
    with pytest.raises(AdapterError, match="meta"):
        lrcompile.load(model, saved)
    assert "_lrcompile" not in model.__dict__


# Hostile and broken files


def test_unknown_missing_and_misshapen_tensors_are_one_error(saved: Path):
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["base_model.model.elsewhere.lora_A.weight"] = torch.ones(3, 9)
        del tensors[f"{BODY}.down.lora_B.weight"]
        tensors[f"{BODY}.up.lora_A.weight"] = torch.ones(5, 10)

    rewritten(saved, change)
    refused(
        saved,
        r"(?s)unknown keys.*elsewhere.*missing keys.*down.lora_B"
        r".*wrong shapes.*up\.lora_A\.weight is \[5, 10\], expected \[5, 9\]",
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_refused_by_name(saved: Path, value: float):
    rewritten(saved, lambda tensors: tensors[f"{BODY}.up.lora_B.weight"].view(-1)[3:4].fill_(value))
    refused(saved, r"up\.lora_B\.weight")


def test_a_dtype_that_no_adapter_has_is_refused(saved: Path):
    rewritten(saved, lambda tensors: tensors.update({"base_model.model.head.bias": torch.ones(3, dtype=torch.int64)}))
    refused(saved, "I64")


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(path: Path, header: bytes, data: bytes, length: int | None = None) -> None:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    resealed(path.parent)


@pytest.mark.parametrize("length", [0, 1, 1 << 20, 1 << 40, (1 << 64) - 1])
def test_a_hostile_header_length_is_refused_before_anything_is_allocated(saved: Path, length: int):
    header, data = header_of(saved / WEIGHTS)
    with_header(saved / WEIGHTS, json.dumps(header).encode(), data, length)
    refused(saved, WEIGHTS)


def test_a_header_that_is_too_large_is_refused(saved: Path):
    (saved / WEIGHTS).write_bytes(struct.pack("<Q", 32 << 20) + b" " * (32 << 20))
    resealed(saved)
    refused(saved, "headers above")


def test_a_key_that_stands_twice_is_refused(saved: Path):
    header, data = header_of(saved / WEIGHTS)
    name = next(key for key in header if key != "__metadata__")
    text = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}"
    with_header(saved / WEIGHTS, text.encode(), data)
    refused(saved, "stands twice")


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [1 << 61, 4]},
        {"shape": [-1]},
        {"shape": [True]},
        {"shape": "9"},
        {"shape": [1] * 9},
        {"data_offsets": [0, 1 << 60]},
        {"data_offsets": [8, 4]},
        {"data_offsets": [4]},
        {"dtype": ["F32"]},
        {"dtype": "F8_E5M2"},
        {"more": 1},
    ],
)
def test_a_claim_that_cannot_be_is_refused(saved: Path, change: dict[str, Any]):
    header, data = header_of(saved / WEIGHTS)
    name = next(key for key in header if key != "__metadata__")
    header[name] |= change
    with_header(saved / WEIGHTS, json.dumps(header).encode(), data)
    refused(saved, WEIGHTS)


def test_tensors_that_overlap_leave_a_hole_or_do_not_fill_the_file_are_refused_by_their_header(saved: Path):
    path = saved / WEIGHTS
    header, data = header_of(path)
    first, second = [key for key in header if header[key].get("shape") in ([3], [13])][:2]
    for change in (
        {second: header[first]},
        {first: ...},
        {second: header[second] | {"shape": [1], "data_offsets": [0, 4]}},
    ):
        claims = {key: claim for key, claim in (header | change).items() if claim is not ...}
        with_header(path, json.dumps(claims).encode(), data)
        with pytest.raises(AdapterError, match="overlap, or leave a hole"), open_tensors(path):
            pass
    for more in (data + b"\0", data[:-1]):
        with_header(path, json.dumps(header).encode(), more)
        with pytest.raises(AdapterError, match="truncated or padded"), open_tensors(path):
            pass


def test_more_tensors_than_any_adapter_has_are_refused(tmp_path: Path):
    claims = {str(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_001)}
    with_header(tmp_path / WEIGHTS, json.dumps(claims).encode(), b"")
    with pytest.raises(AdapterError, match="100001 tensors"), open_tensors(tmp_path / WEIGHTS):
        pass


@settings(deadline=None, max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused(saved: Path, cut: float):
    data = (saved / WEIGHTS).read_bytes()
    with_it = saved.parent / "cut"
    with_it.mkdir(exist_ok=True)
    for name in (CONFIG, OURS):
        (with_it / name).write_bytes((saved / name).read_bytes())
    (with_it / WEIGHTS).write_bytes(data[: int(cut * len(data))])
    resealed(with_it)
    refused(with_it, WEIGHTS)


@settings(
    deadline=None, max_examples=120, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), name=st.sampled_from([WEIGHTS, CONFIG, OURS]), hostile=st.booleans())
def test_flipped_bits_are_a_typed_error_or_told_and_change_no_base(
    saved: Path, data: st.DataObject, name: str, hostile: bool
):
    folder = saved.parent / "flipped"
    folder.mkdir(exist_ok=True)
    files = {each: (saved / each).read_bytes() for each in (CONFIG, OURS, WEIGHTS)}
    content = bytearray(files[name])
    size = 8 + struct.unpack("<Q", content[:8])[0] if name == WEIGHTS else len(content)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, size - 1))] ^= 1 << data.draw(st.integers(0, 7))
    for each, bits in (files | {name: bytes(content)}).items():
        (folder / each).write_bytes(bits)
    if hostile:
        resealed(folder)
    model = Model()
    before = everything(model)
    try:
        lrcompile.load(model, folder)
    except AdapterError:
        same(before, everything(model))
    else:
        told = name == CONFIG and "was not used" in str(lrcompile.report(model))
        assert hostile or told or bytes(content) == files[name]
        lrcompile.remove(model)  # such as a flipped digit of alpha, or of a name nobody reads
        assert all(torch.equal(before["bits"][key], tensor) for key, tensor in model.state_dict().items())


def test_a_pickle_is_never_opened(tmp_path: Path):
    class Bomb:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "exploded"),))

    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "target_modules": ["up"]}))
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    refused(tmp_path, "pickle")
    (tmp_path / WEIGHTS).write_bytes(pickle.dumps(Bomb()))
    refused(tmp_path, WEIGHTS)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", CONFIG),
        ("[1]", "object"),
        ('{"peft_type": "LORA", "peft_type": "LORA"}', "twice"),
        ('{"peft_type": "LORA", "r": NaN, "target_modules": ["up"]}', "NaN"),
        ('{"peft_type": "LOHA", "target_modules": ["up"]}', "LOHA"),
        ('{"peft_type": "LORA", "target_modules": ["up"], "use_qalora": true}', "use_qalora"),
        ('{"peft_type": "LORA", "target_modules": ["up"], "r": 1000}', "unknown keys"),
        ('{"peft_type": "LORA", "target_modules": ["up"], "r": 1000000000000000000000000000000}', "no adapter has"),
        ('{"peft_type": "LORA", "target_modules": ["up"], "lora_alpha": 1e300}', "float32 cannot hold"),
        ('{"peft_type": "LORA", "target_modules": ["up"], "modules_to_save": ["("]}', "modules_to_save"),
        ('{"peft_type": "LORA", "target_modules": ["nowhere"]}', "hit nothing"),
        ('{"peft_type": "LORA", "target_modules": "("}', "regular expression"),
        ("[" * 100_000, "JSON"),
    ],
)
def test_a_config_that_is_wrong_is_refused(saved: Path, text: str, match: str):
    (saved / OURS).unlink()
    (saved / CONFIG).write_text(text)
    refused(saved, match)


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": 2},
        {"schema": True},
        {"more": 1},
        {"spec": ...},
        {"spec": {"method": "lora", "rank": -1}},
        {"spec": []},
        {"spec": {"method": "no-such"}},
        {"base": {"sampled": False, "sites": []}},
        {"base": {"sampled": False, "sites": {"a": {}}}},
        {"base": None},
    ],
)
def test_our_own_file_is_hostile_too(saved: Path, changes: dict[str, Any]):
    edited(saved / OURS, **changes)
    refused(saved, OURS)


def test_a_folder_that_is_none_says_what_was_expected(tmp_path: Path, saved: Path):
    refused(tmp_path / "nowhere", CONFIG)
    refused(tmp_path, "sub-folders adapter")
    (saved / WEIGHTS).unlink()
    refused(saved, WEIGHTS)


def test_a_folder_where_a_file_should_be_is_refused(saved: Path):
    (saved / OURS).unlink()
    (saved / OURS).mkdir()
    refused(saved, OURS)


def test_sites_that_differ_are_listed_from_both_sides(saved: Path):
    (saved / OURS).unlink()
    config = json.loads((saved / CONFIG).read_text())
    edited(
        saved / CONFIG,
        target_modules=["fit", "emb", "down", "attn"]
        if isinstance(config["target_modules"], list)
        else config["target_modules"],
    )
    refused(saved, r"(?s)unknown keys.*up\.lora_A.*missing keys.*fit\.lora_A")


# Folders


def test_what_is_not_ours_stays_in_the_folder(saved: Path):
    (saved / "README.md").write_text("mine")
    (saved / "notes").mkdir()
    (saved / "notes/a.txt").write_text("mine too")
    (saved / "adapter_model.bin").write_bytes(b"stale weights beside new ones would be a mixture")
    lrcompile.save(adapted(seed=4), saved)
    assert (saved / "README.md").read_text() == "mine"
    assert (saved / "notes/a.txt").read_text() == "mine too"
    assert sorted(path.name for path in saved.iterdir()) == ["README.md", CONFIG, WEIGHTS, OURS, "notes"]
    assert not [path for path in saved.parent.iterdir() if path.name.startswith(".")]


def test_what_is_not_ours_stays_in_sub_folders_of_adapters(tmp_path: Path):
    model = adapted(name="one")
    adapted(model, "two", seed=5)
    lrcompile.save(model, tmp_path / "a")
    (tmp_path / "a/two/README.md").write_text("mine")
    lrcompile.save(adapted(), tmp_path / "a", "default")
    lrcompile.save(model, tmp_path / "a")
    assert (tmp_path / "a/two/README.md").read_text() == "mine"
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [CONFIG, WEIGHTS, OURS, "one", "two"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_a_folder_that_cannot_be_written_is_one_error_and_keeps_what_it_had(
    saved: Path, code: int, monkeypatch: pytest.MonkeyPatch
):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    model = adapted(seed=4)
    original = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if self.name == WEIGHTS:
            original(self, data[: len(data) // 2])
            raise OSError(code, os.strerror(code))
        return original(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(AdapterError, match=os.strerror(code)):
        lrcompile.save(model, saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["adapter"]


def test_a_path_that_is_a_file_is_refused(tmp_path: Path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(AdapterError, match="file"):
        lrcompile.save(adapted(), tmp_path / "a")
    assert (tmp_path / "a").read_text() == "mine"


def test_the_working_folder_is_not_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterError, match="working folder"):
        lrcompile.save(adapted(), ".")
    assert not list(tmp_path.iterdir())


def test_a_diverged_adapter_does_not_replace_a_good_one(saved: Path):
    before = (saved / WEIGHTS).read_bytes()
    model = adapted(seed=4)
    with torch.no_grad():
        next(p for key, p in model.named_parameters() if key.endswith("default.A")).fill_(float("nan"))
    with pytest.raises(AdapterError, match="diverged"):
        lrcompile.save(model, saved)
    assert (saved / WEIGHTS).read_bytes() == before


def test_a_model_without_adapters_or_a_name_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(AdapterError, match="no adapter"):
        lrcompile.save(Model(), tmp_path / "a")
    with pytest.raises(AdapterError, match="'other'"):
        lrcompile.save(adapted(), tmp_path / "a", "other")
    assert not (tmp_path / "a").exists()


def test_weights_that_are_not_those_written_are_refused_and_without_our_file_read_as_pefts(saved: Path):
    tensors = {key: tensor * 2 for key, tensor in load_file(saved / WEIGHTS).items()}
    save_file(tensors, saved / WEIGHTS, metadata={"format": "pt"})
    refused(saved, "their sha256 differ.*delete lrcompile.json")
    (saved / OURS).unlink()
    lrcompile.load(Model(), saved)
