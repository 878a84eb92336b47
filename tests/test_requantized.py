"""The eager twin of a file whose weights are NF4, and what these leave of an adapter's effect."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lrcompile
from lrcompile.verifying.requantized import requantized, taken_by_codes

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

X = torch.randn(7, 64, generator=torch.Generator().manual_seed(2))


def adapted(size: float) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 33)).eval()
    lrcompile.apply(model, lrcompile.spec("lora", rank=3, alpha=3, targets=["0", "2"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                parameter.normal_(std=size)
    return model


@pytest.mark.parametrize("adapters", ["merge", "inline"])
def test_the_verdict_says_what_nf4_leaves_of_the_adapters_effect(tmp_path: Path, adapters: str):
    model = adapted(0.3)
    exported = lrcompile.export(model, tmp_path / "m.onnx", (X,), adapters=adapters, quantize="nf4")
    verdict = exported.verify()
    assert verdict.ok, verdict
    with torch.no_grad():
        meant = model(X).double()
        with lrcompile.disabled(model):
            before = model(X).double()
    made = next(iter(lrcompile.run(tmp_path / "m.onnx").run((X,)).values())).double()
    change, there = meant - before, made - before
    share, error = float((there * change).sum() / change.square().sum()), float((made - meant).norm() / change.norm())
    assert verdict.note is not None
    found = re.search(r"leaves ([\d.]+) of .* distance of ([\d.e+-]+) of it", verdict.note)
    assert found, verdict.note
    assert float(found[1]) == pytest.approx(share, abs=2e-3)
    assert float(found[2]) == pytest.approx(error, rel=2e-2)
    assert 0.01 < error < 0.5


def test_a_small_update_is_far_away_after_rounding_and_none_needs_no_words():
    model = adapted(1e-3)
    said = taken_by_codes(model, requantized(model, ["0", "2"], merged=True), (X,))
    assert said is not None
    found = re.search(r"distance of ([\d.e+-]+)", said)
    assert found
    assert float(found[1]) > 1
    with lrcompile.disabled(model):
        assert taken_by_codes(model, model, (X,)) is None


def test_a_list_of_input_sets_counts_as_all_of_them(tmp_path: Path):
    model = adapted(0.3)
    twin = requantized(model, ["0", "2"], merged=True)
    assert taken_by_codes(model, twin, [(X[:3],), (X[3:],)]) == taken_by_codes(model, twin, (X,))
    assert taken_by_codes(model, twin, [{"input": X}]) == taken_by_codes(model, twin, (X,))
    exported = lrcompile.export(model, tmp_path / "m.onnx", (X,), quantize="nf4")
    verdict = exported.verify([(X[:3],), (X[3:],)])
    assert verdict.ok, verdict
    assert verdict.note is not None
