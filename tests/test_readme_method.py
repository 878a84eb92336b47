"""The method the README shows is one file, and does everything the others do."""

from __future__ import annotations

import importlib
import re
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from zoo.every_method import RANK, base, batches, train

import lrcompile
from lrcompile import recipes

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SOURCE = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "gated_lora.py" in block)


@pytest.fixture
def gated(monkeypatch, tmp_path):
    (tmp_path / "gated_lora.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    point = EntryPoint("gated-lora", "gated_lora:RECIPE", "lrcompile.methods")
    monkeypatch.setattr(recipes, "entry_points", lambda group: [point] if group == point.group else [])
    recipes._plugins.cache_clear()
    model: Any = base()
    lrcompile.apply(model, lrcompile.spec("gated-lora", rank=RANK, targets=["up", "down"]))
    train(model, lrcompile.optimizer(model, torch.optim.AdamW, lr=0.02), batches(4))
    yield model.eval()
    recipes._plugins.cache_clear()
    sys.modules.pop("gated_lora", None)


def test_it_is_shorter_than_forty_lines():
    assert len(SOURCE.splitlines()) < 40


def test_its_gain_trains_and_its_update_merges(gated):
    x = batches(1)[0]["x"]
    gains = [p for name, p in gated.named_parameters() if name.endswith(".g")]
    assert len(gains) == 4
    assert all(bool(gain.ne(1).any()) for gain in gains)
    expected = gated(x).logits.detach()
    lrcompile.merge(gated)
    assert torch.allclose(gated(x).logits, expected, atol=1e-5)
    lrcompile.unmerge(gated)
    assert torch.equal(gated(x).logits, expected)


def test_it_saves_loads_converts_and_exports(gated, tmp_path):
    x = batches(1)[0]["x"]
    expected = gated(x).logits.detach()
    lrcompile.save(gated, tmp_path / "adapter")
    other = lrcompile.load(base(), tmp_path / "adapter").eval()
    assert torch.equal(other(x).logits, expected)
    assert lrcompile.export(gated, tmp_path / "model.onnx", {"x": x}).verify().ok
    lrcompile.to_lora(gated)
    assert torch.allclose(gated(x).logits, expected, atol=1e-5)
