"""Quantized models as folders: every bit back, of NF4 and integers alike; damaged or foreign ones are one error."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from zoo import language

import lrcompile
from lrcompile.allocating import integers_as
from lrcompile.budgets import INT4, INT8
from lrcompile.checkpointing.files import sealed
from lrcompile.coded import is_coded
from lrcompile.demo.opening import open_model
from lrcompile.demo.tiny import write_tiny_bert
from lrcompile.errors import LrcompileError, ModelError
from lrcompile.integers.modules import attach_integers
from lrcompile.quantized_folders import CARD, WEIGHTS
from lrcompile.storage import described_maps
from lrcompile.verifying.manifest import sha256


class Mixed(nn.Module):
    """Maps for every form, one of them without a bias, a norm, and buffers that no weight is."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(70, 48), nn.Linear(48, 33, bias=False), nn.Linear(33, 48)
        self.last, self.norm = nn.Linear(48, 5), nn.LayerNorm(48)
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, x):
        return self.last(self.norm(self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))))


def mixed(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return Mixed().eval()


X = torch.randn(4, 70, generator=torch.Generator().manual_seed(0))


def quantized() -> Any:
    model = mixed()
    lrcompile.quantize(model, targets=["first"], block_size=32, double_quant=False)
    lrcompile.quantize(model, targets=["last"], compute_dtype="float32")
    for name, form in (("second", INT8), ("third", INT4)):
        attach_integers(model.get_submodule(name), *integers_as(model.get_submodule(name), form))
    return model


def forms(model: nn.Module) -> dict[str, str]:
    return {name: said["form"] for name, said in described_maps(model).items()}


def bits(model: nn.Module) -> dict[str, tuple[torch.dtype, bytes]]:
    return {
        name: (value.dtype, value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        for name, value in model.state_dict().items()
    }


def test_maps_of_every_form_come_back_with_every_bit_and_the_same_outputs(tmp_path):
    model = quantized()
    assert forms(model) == {"first": "nf4", "second": "int8", "third": "int4", "last": "nf4"}
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "README").write_text("mine")
    assert lrcompile.save_quantized(model, tmp_path / "m") == tmp_path / "m"
    again = lrcompile.load_quantized(mixed(1), tmp_path / "m")
    assert bits(again) == bits(model)
    assert forms(again) == forms(model)
    assert [str(module) for module in again.modules()] == [str(module) for module in model.modules()]
    assert torch.equal(again(X), model(X))
    assert (tmp_path / "m" / "README").read_text() == "mine"
    lrcompile.save_quantized(again, tmp_path / "m")  # over the old one
    assert torch.equal(lrcompile.load_quantized(mixed(2), tmp_path / "m")(X), model(X))
    assert {path.name for path in tmp_path.iterdir()} == {"m"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_dtype_of_the_model_is_that_of_the_folder(tmp_path, dtype):
    model = lrcompile.quantize(mixed().to(dtype), targets=["first", "third"], compute_dtype="float32")
    lrcompile.save_quantized(model, tmp_path / "m")
    again: Any = lrcompile.load_quantized(mixed(1), tmp_path / "m")
    assert again.first.weight.dtype == again.last.weight.dtype == dtype
    assert bits(again) == bits(model)
    assert torch.equal(again(X.to(dtype)), model(X.to(dtype)))


def test_a_decoder_quantized_within_a_budget_generates_the_same_and_keeps_its_ties(tmp_path):
    base = language.base(32, 5).eval()
    base.lm_head.weight = base.model.embed_tokens.weight
    base.config.tie_word_embeddings = True
    blank = copy.deepcopy(base)
    for parameter in blank.parameters():
        nn.init.normal_(parameter)
    model = lrcompile.quantize(base, budget={"share": 0.2}, data=language.sample(2, 1))
    assert len(set(forms(model).values())) > 1
    lrcompile.save_quantized(model, tmp_path / "m")
    again: Any = lrcompile.load_quantized(blank, tmp_path / "m")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    ids = language.sample(1, 2)[0]["input_ids"][:2, :8]
    assert torch.equal(again.generate(ids, max_new_tokens=6), base.generate(ids, max_new_tokens=6))
    assert json.loads((tmp_path / "m" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_adapters_train_and_load_on_what_is_float_or_nf4_and_integers_are_refused(tmp_path):
    lrcompile.save_quantized(quantized(), tmp_path / "m")
    model: Any = lrcompile.load_quantized(mixed(1), tmp_path / "m")
    spec = lrcompile.spec("lora", rank=2, targets=["first", "last"], seed=0)
    lrcompile.apply(model, spec)
    optimizer = lrcompile.optimizer(model, torch.optim.SGD, lr=0.1)
    for _ in range(2):
        model(X).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    y = model(X)
    lrcompile.save(model, tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"lrcompile\.save writes them"):
        lrcompile.save_quantized(model, tmp_path / "n")
    with pytest.raises(ModelError, match="carries adapters"):
        lrcompile.load_quantized(model, tmp_path / "m")
    again: Any = lrcompile.load_quantized(mixed(2), tmp_path / "m")
    lrcompile.load(again, tmp_path / "adapter")
    assert torch.equal(again(X), y)
    with pytest.raises(lrcompile.TargetError, match="stored as integers"):
        lrcompile.apply(lrcompile.load_quantized(mixed(2), tmp_path / "m"), spec_on(model, "int8"))
    lrcompile.merge(again, into="float32", final=True)
    lrcompile.save_quantized(again, tmp_path / "merged")  # what was NF4 is float, integers are still integers
    assert torch.equal(lrcompile.load_quantized(mixed(3), tmp_path / "merged")(X), again(X))


def spec_on(model: nn.Module, form: str) -> lrcompile.Spec:
    name = next(name for name, each in forms(model).items() if each == form)
    return lrcompile.spec("lora", rank=2, targets=[name])


def test_a_model_that_cannot_be_written_is_one_error_and_leaves_the_folder(tmp_path):
    plain = mixed()
    with pytest.raises(ModelError, match=r"call lrcompile\.quantize first"):
        lrcompile.save_quantized(plain, tmp_path / "m")
    broken = quantized()
    broken.norm.weight.data[0] = torch.nan
    with pytest.raises(ModelError, match=r"NaN or infinite values: norm\.weight"):
        lrcompile.save_quantized(broken, tmp_path / "m")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ModelError, match="working folder"):
        lrcompile.save_quantized(quantized(), Path.cwd())
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ModelError, match="cannot write"):
        lrcompile.save_quantized(quantized(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


class Other(Mixed):
    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(48, 34, bias=False)


class Tied(Mixed):
    def __init__(self) -> None:
        super().__init__()
        self.twin = nn.Linear(70, 48)
        self.twin.weight = self.first.weight


FOREIGN = {
    "another shape": (Other, ModelError, r"second\.weight_\w+ is uint8 \[33, .* expected uint8 \[34"),
    "no such map": (lambda: nn.Sequential(nn.Linear(70, 48)), lrcompile.TargetError, "first"),
    "a tied map": (Tied, lrcompile.TargetError, "its weight is shared"),
    "quantized already": (quantized, lrcompile.TargetError, "stored as NF4 already"),
    "without values": (lambda: mixed().to("meta"), ModelError, "meta device"),
    "no module": (dict, lrcompile.AdapterError, "a dict"),
}  # fmt: skip


@pytest.mark.parametrize(("build", "error", "message"), FOREIGN.values(), ids=FOREIGN)
def test_a_model_the_folder_does_not_fit_is_refused_and_left_as_it_was(tmp_path, build, error, message):
    lrcompile.save_quantized(quantized(), tmp_path / "m")
    model = build()
    before = bits(model) if isinstance(model, nn.Module) and not next(model.parameters()).is_meta else None
    with pytest.raises(error, match=message):
        lrcompile.load_quantized(model, tmp_path / "m")
    assert before is None or bits(model) == before


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Other tensors under hashes that are right: somebody who knows the format."""

    def edit(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)
        _card(lambda card: card["files"].update({WEIGHTS: sha256(folder / WEIGHTS)}))(folder)

    return edit


def _card(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        card = json.loads((folder / CARD).read_text())
        change(card)
        (folder / CARD).write_text(json.dumps(sealed(card)))

    return edit


def _said(**values: Any) -> Callable[[Path], None]:
    return _card(lambda card: card["maps"]["first"].update(values))


def _device(folder: Path) -> None:
    _card(lambda card: card["files"].update({"config.json": "0"}))(folder)
    (folder / "config.json").symlink_to("/dev/zero")


HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a key gone": (_tensors(lambda t: t.pop("first.weight_codes")), r"lacks first\.weight_codes"),
    "a key more": (_tensors(lambda t: t.update(evil=torch.zeros(1))), "holds evil"),
    "a weight beside codes": (_tensors(lambda t: t.update({"first.weight": torch.zeros(1)})), r"holds first\.weight"),
    "a wrong shape": (_tensors(lambda t: t.update({"norm.bias": torch.zeros(49)})), r"norm\.bias is float32 \[49\]"),
    "codes too short": (_tensors(lambda t: t.update({"first.weight_codes": t["first.weight_codes"][:-1].clone()})),
                        r"first\.weight_codes is uint8 \[1679\]"),
    "scales in half": (_tensors(lambda t: t.update({"first.weight_absmax": t["first.weight_absmax"].half()})),
                       r"weight_absmax is float16"),
    "codes of another type": (_tensors(lambda t: t.update({"first.weight_codes": torch.zeros(1680, dtype=torch.int8)})),
                              r"weight_codes is int8"),
    "a count in floats": (_tensors(lambda t: t.update(steps=torch.tensor(3.0))), r"steps is float32"),
    "a scale that is not finite": (_tensors(lambda t: t["first.weight_absmax"].fill_(torch.inf)), "NaN or infinite"),
    "a parameter that is not finite": (_tensors(lambda t: t["last.bias"].fill_(torch.nan)), r"last\.bias"),
    "an unknown form": (_said(form="int2"), "'int2'; expected one of nf4, int8, int4"),
    "another form": (_said(form="int8"), "must say exactly block_size, dtype, form"),
    "a block size of zero": (_said(block_size=0), "block_size 0"),
    "a block size that is true": (_said(block_size=True), "block_size True"),
    "another block size": (_said(block_size=64), "weight_absmax is float32"),
    "a huge block size": (_said(block_size=10**30), "expected one of"),
    "double quantization": (_said(double_quant=True), "lacks first.weight_absmax_scale"),
    "a dtype that is none": (_said(dtype="os.system"), "dtype 'os.system'"),
    "a list for a dtype": (_said(compute_dtype=["float32"]), "compute_dtype"),
    "an unknown setting": (_said(code="print(1)"), "must say exactly"),
    "no map": (_card(lambda card: card.update(maps={})), "at least one"),
    "maps in a list": (_card(lambda card: card.update(maps=[1])), "at least one"),
    "a map that is no dict": (_card(lambda card: card["maps"].update(first=3)), "stored as None"),
    "a map of nothing": (_card(lambda card: card["maps"].update(norm=card["maps"]["first"])), "norm"),
    "a map twice": (_card(lambda card: card["maps"].update({"": card["maps"]["first"]})), "under two names"),
    "a file elsewhere": (_card(lambda card: card["files"].update({"../../etc/passwd": "0"})), "files must name"),
    "a device for a file": (_device, "has no config.json"),
    "another schema": (_card(lambda card: card.update(schema=2)), "schema 2"),
    "an unknown key": (_card(lambda card: card.update(run="me")), "unknown keys: run"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), f"has no {WEIGHTS}"),
    "no card": (lambda folder: (folder / CARD).unlink(), "cannot be read"),
    "a card that is no JSON": (lambda folder: (folder / CARD).write_text("{"), "not valid JSON"),
}  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lrcompile.save_quantized(quantized(), tmp_path_factory.mktemp("quantized") / "m")


@pytest.mark.parametrize(("edit", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_folder_made_to_harm_is_one_error_and_changes_nothing(written, tmp_path, edit, message):
    folder = tmp_path / "m"
    shutil.copytree(written, folder)
    edit(folder)
    model = mixed(1)
    before = bits(model)
    with pytest.raises(LrcompileError, match=message):
        lrcompile.load_quantized(model, folder)
    assert bits(model) == before
    assert not any(map(is_coded, model.modules()))


def test_a_config_that_makes_a_huge_model_is_refused_before_it_is_made(tmp_path):
    model: Any = open_model(str(write_tiny_bert(tmp_path / "tiny"))).model
    lrcompile.quantize(model, targets=["query"])
    lrcompile.save_quantized(model, tmp_path / "m")
    assert bits(open_model(str(tmp_path / "m")).model) == bits(model)
    config = tmp_path / "m" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "vocab_size": 10**11}))
    with pytest.raises(ModelError, match=r"embeddings\.word_embeddings\.weight is float32 .*100000000000"):
        open_model(str(tmp_path / "m"))  # 9.6 TB


@pytest.mark.parametrize("name", [CARD, WEIGHTS])
def test_no_changed_byte_is_loaded(written, tmp_path, name):
    chance, whole = random.Random(name), (written / name).read_bytes()
    folder = tmp_path / "m"
    shutil.copytree(written, folder)
    model = mixed(1)
    before = bits(model)
    for at in range(150):
        data = bytearray(whole)
        where = chance.randrange(len(data))
        kind = chance.choice(["flip", "cut", "insert", "blank"])
        if kind == "flip":
            data[where] ^= 1 << chance.randrange(8)
        elif kind == "cut":
            del data[where:]
        elif kind == "insert":
            data[where:where] = chance.randbytes(9)
        else:
            data[where : where + 16] = b"\xff" * 16
        if bytes(data) == whole or (name == CARD and _same_json(data, whole)):
            continue
        (folder / name).write_bytes(data)
        try:
            lrcompile.load_quantized(model, folder)
        except LrcompileError:
            continue
        raise AssertionError(f"mutation {at} ({kind} at {where}) was loaded")
    assert bits(model) == before


JUNK: list[Any] = [
    None, True, -1, 0, 2**63, 10**400, 1e308, "", "x" * 5000, "../../etc/passwd", "nf4", "int8", "float64", "third", [],
    {}, [[]], {"form": "nf4"}, ["float32"], "\u0000", "(a+)+$", 64, 128,
]  # fmt: skip


def test_a_card_changed_by_somebody_who_can_seal_it_leads_to_no_crash_and_no_other_shapes(written, tmp_path):
    chance, folder, seen = random.Random(0), tmp_path / "m", {"refused": 0, "loaded": 0}
    shutil.copytree(written, folder)
    original = json.loads((written / CARD).read_text())
    right = {name: value.shape for name, value in quantized().state_dict().items()}
    for _ in range(300):
        card = copy.deepcopy(original)
        place = card
        while True:
            key = chance.choice(list(place))
            if not (isinstance(place[key], dict) and place[key] and chance.random() < 0.8):
                break
            place = place[key]
        what = chance.choice(["put", "drop", "rename"])
        if what == "put":
            place[key] = chance.choice(JUNK)
        else:
            value = place.pop(key)
            if what == "rename":
                place[str(chance.choice(JUNK))] = value
        (folder / CARD).write_text(json.dumps(sealed(card)))
        model = mixed(1)
        try:
            lrcompile.load_quantized(model, folder)
        except LrcompileError:
            seen["refused"] += 1
            assert not any(map(is_coded, model.modules()))
            continue
        seen["loaded"] += 1  # another dtype to answer or to compute in, or nothing at all
        assert {name: value.shape for name, value in model.state_dict().items()} == right
    assert seen["refused"] > 200


def _same_json(data: bytearray, whole: bytes) -> bool:
    try:
        return json.loads(bytes(data)) == json.loads(whole)
    except ValueError:
        return False


def test_a_header_changed_by_somebody_who_can_hash_loads_no_other_shapes(written, tmp_path):
    """Bytes of the safetensors header flipped, under a hash that is right."""
    chance, folder, refused = random.Random(0), tmp_path / "m", 0
    shutil.copytree(written, folder)
    whole = (written / WEIGHTS).read_bytes()
    length = int.from_bytes(whole[:8], "little")
    right = {name: (value.shape, value.dtype) for name, value in quantized().state_dict().items()}
    for _ in range(150):
        data = bytearray(whole)
        data[chance.randrange(8 + length)] ^= 1 << chance.randrange(8)
        (folder / WEIGHTS).write_bytes(data)
        _card(lambda card: card["files"].update({WEIGHTS: sha256(folder / WEIGHTS)}))(folder)
        model = mixed(1)
        try:
            lrcompile.load_quantized(model, folder)
        except LrcompileError:
            refused += 1
            continue
        assert {name: (value.shape, value.dtype) for name, value in model.state_dict().items()} == right
    assert refused > 120
