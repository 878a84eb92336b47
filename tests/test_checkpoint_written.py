"""Weights that a method has written travel with its adapter; below them a load keeps the base's bits."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from zoo.sealing import resealed

import lrcompile
from lrcompile import AdapterError
from lrcompile.checkpointing.files import OURS, WEIGHTS

FIELDS: dict[str, dict[str, Any]] = {
    "plora": {"period": 2, "momentum": 0.5, "rank": 2, "seed": 3},
    "galore": {"update_proj_gap": 2, "rank": 2, "seed": 3},
}
METHODS = [method for method in FIELDS if method in lrcompile.methods()]
TARGETS = r"layers\.\d"
X = torch.linspace(-2, 2, 4 * 9).reshape(4, 9)
WRITTEN = ["layers.0.weight", "layers.2.weight"]


class Model(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(9, 13), nn.Tanh(), nn.Linear(13, 9))
        self.head = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x))


def trained(method: str, steps: int = 3) -> nn.Module:
    model = lrcompile.apply(Model(), lrcompile.spec(method, targets=TARGETS, **FIELDS[method]))
    optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    return lrcompile.activate(model, "default", train=()).eval()


def out(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(X)


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items() if "lrcompile" not in key}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("method", METHODS)
def test_written_weights_come_back_and_the_base_below_them_too(method: str, tmp_path: Path):
    model = trained(method)
    folder = lrcompile.save(model, tmp_path / "a")
    assert sorted(key for key in load_file(folder / WEIGHTS) if key.startswith("written.")) == [
        f"written.{name}" for name in WRITTEN
    ]
    plain = Model()
    before, parameter = bits(plain), plain.get_parameter(WRITTEN[0])
    again = lrcompile.load(plain, folder).eval()
    assert torch.equal(out(again), out(model))
    assert equal(bits(again), bits(model))
    with lrcompile.disabled(again):
        assert equal(bits(again), before)
    assert equal(bits(again), bits(model))
    lrcompile.remove(again)
    assert equal(bits(plain), before)
    assert plain.get_parameter(WRITTEN[0]) is parameter


@pytest.mark.parametrize("method", METHODS)
def test_before_anything_is_written_nothing_of_the_base_is_saved(method: str, tmp_path: Path):
    folder = lrcompile.save(trained(method, 0), tmp_path / "a")
    assert all(key.startswith("adapter.") for key in load_file(folder / WEIGHTS))
    with pytest.raises(AdapterError, match="other values"):
        lrcompile.load(Model(1), folder)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_loaded_is_saved_again_to_the_bit(method: str, tmp_path: Path):
    model = trained(method)
    first = lrcompile.save(model, tmp_path / "first")
    again = lrcompile.load(Model(), first)
    lrcompile.apply(again, lrcompile.spec("lora", rank=2, targets=["head"]), name="other")
    assert not equal(bits(again), bits(model))  # the other one is active, so the base is in place
    second = lrcompile.save(again, tmp_path / "second", "default")
    assert equal(load_file(first / WEIGHTS), load_file(second / WEIGHTS))
    lrcompile.activate(again, "default")
    lrcompile.merge(again)
    assert equal(load_file(lrcompile.save(again, second, "default") / WEIGHTS), load_file(first / WEIGHTS))
    lrcompile.unmerge(again)
    lrcompile.merge(model)
    assert equal(load_file(lrcompile.save(model, second) / WEIGHTS), load_file(first / WEIGHTS))


@pytest.mark.parametrize("method", METHODS)
def test_the_written_weights_can_be_kept(method: str, tmp_path: Path):
    model = trained(method)
    folder = lrcompile.save(model, tmp_path / "a")
    for active in (True, False):
        again = lrcompile.load(Model(), folder)
        if not active:
            lrcompile.activate(again, [])
        lrcompile.remove(again, keep_trained_weights=True)
        assert equal(bits(again), bits(model))


@pytest.mark.parametrize("method", METHODS)
def test_a_copy_is_independent(method: str, tmp_path: Path):
    model = trained(method)
    again = lrcompile.load(Model(), lrcompile.save(model, tmp_path / "a"))
    copied = copy.deepcopy(again)
    lrcompile.remove(again)
    assert torch.equal(out(copied.eval()), out(model))
    lrcompile.remove(copied)
    assert equal(bits(copied), bits(Model()))


@pytest.mark.parametrize("method", METHODS)
def test_replacing_an_adapter_that_wrote_weights_nobody_kept_is_refused(method: str, tmp_path: Path):
    folder = lrcompile.save(trained(method), tmp_path / "a")
    model = trained(method, 4)
    before = bits(model)
    with pytest.raises(AdapterError, match="cannot replace adapter 'default'"):
        lrcompile.load(model, folder, replace=True)
    assert equal(bits(model), before)
    loaded = lrcompile.load(Model(), folder)
    lrcompile.load(loaded, folder, replace=True)  # its base was kept
    assert equal(bits(loaded), bits(trained(method)))


@pytest.mark.parametrize("method", METHODS)
def test_flags_and_weights_must_agree(method: str, tmp_path: Path):
    folder = lrcompile.save(trained(method), tmp_path / "a")
    tensors = load_file(folder / WEIGHTS)
    flag, weight = "adapter.layers.0.written", "written.layers.0.weight"
    for changed, said in (
        ({key: tensor for key, tensor in tensors.items() if key != weight}, "does not hold the weights"),
        (tensors | {flag: torch.tensor(False)}, "does not hold the weights"),
        (tensors | {"written.head.weight": torch.ones(4, 9)}, "unknown keys"),
        (tensors | {weight: torch.ones(13, 8)}, "wrong shapes"),
        (tensors | {weight: torch.ones(13, 9, dtype=torch.int8)}, "wrong dtypes"),
        (tensors | {weight: torch.full((13, 9), float("nan"))}, "NaN"),
    ):
        save_file(changed, folder / WEIGHTS)
        resealed(folder)
        model = Model()
        with pytest.raises(AdapterError, match=said):
            lrcompile.load(model, folder)
        assert "_lrcompile" not in model.__dict__
        assert equal(bits(model), bits(Model()))


@pytest.mark.parametrize("method", METHODS)
def test_a_load_that_fails_half_way_leaves_the_model_as_it_was(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = lrcompile.save(trained(method), tmp_path / "a")
    model = Model()
    monkeypatch.setattr("lrcompile.trained.Trained.write", lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
    with pytest.raises(MemoryError):
        lrcompile.load(model, folder)
    assert "_lrcompile" not in model.__dict__
    assert equal(bits(model), bits(Model()))


@pytest.mark.parametrize("method", METHODS)
def test_bits_of_a_base_that_the_adapter_replaces_are_not_compared(method: str, tmp_path: Path):
    model = trained(method)
    folder = lrcompile.save(model, tmp_path / "a")
    assert {site["sha256"] for site in json.loads((folder / OURS).read_text())["base"]["sites"].values()} == {None}
    other = Model()
    with torch.no_grad():
        other.get_parameter(WRITTEN[0]).add_(1)
    assert torch.equal(out(lrcompile.load(other, folder).eval()), out(model))
