"""benchmarks/train_step.py: every variant is measured by one protocol, and what it counts is right."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

from steps.accuracy import errors
from steps.cases import Case, Maps, build
from steps.measuring import measure
from steps.results import keep, kept
from steps.targets import galore, judged
from steps.variants import METHODS, variants

WIDTH, INSIDE, ROWS = 32, 48, 7
CASE = Case("tiny", "a tiny one", lambda: Maps(WIDTH, INSIDE), (1, ROWS, WIDTH))


def all_rounds(rounds: Any) -> Iterable[Any]:
    return rounds


def measured(method: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Of the eager variants."""
    model, x, w = build(CASE, dtype, "cpu")
    found, _ = variants(model, method, WIDTH)
    return measure([each for each in found if each.compiled is None], x, w, 3, all_rounds)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_its_variants_measured_beside_one_denominator(method):
    results = measured(method)
    beside = "full" if method.startswith("galore") else "frozen"
    assert {beside, "ours"} <= results.keys()
    assert ("PEFT" in results) == (not method.startswith("galore"))
    assert results[beside]["ratio"] == [1, 1, 1]
    for one in results.values():
        low, middle, high = one["ratio"]
        assert 0 < low <= middle <= high
        assert one["peak_bytes"] > 4 * ROWS * WIDTH
        assert one["saved_bytes"] is not None
    assert (results["ours"]["seldom_ms"] is not None) == method.startswith("galore")


def test_counts_are_those_of_the_formulas():
    results = measured("lora")
    maps = [m for m in Maps(WIDTH, INSIDE).modules() if isinstance(m, nn.Linear)]
    base = sum(4 * ROWS * m.in_features * m.out_features for m in maps)
    more = sum(6 * ROWS * 16 * (m.in_features + m.out_features) for m in maps)
    assert results["frozen"]["flops"] == base
    assert results["ours"]["flops"] == results["PEFT"]["flops"] == base + more
    inputs = 3 * WIDTH + INSIDE  # of q, k, v; of o; of gate and up; of down
    assert results["frozen"]["saved_bytes"] == 0
    assert results["ours"]["saved_bytes"] == 4 * ROWS * (inputs + 7 * 16)


def test_errors_are_against_true_float64_and_name_the_worst_gradient():
    model, x, w = build(CASE, torch.float32, "cpu")
    found, _ = variants(model, "lora", WIDTH)
    ours = next(each.model for each in found if each.name == "ours")
    right = errors(ours, ours, x, w)
    assert right.keys() == {"y", "dx", "trained"}
    assert all(0 < error < 1e-5 for error in right.values())
    wrong = copy.deepcopy(ours)
    next(p for name, p in wrong.named_parameters() if name.endswith(".B")).register_hook(lambda grad: 1.01 * grad)

    def call(x: Tensor) -> Tensor:
        return wrong(x)

    off = errors(call, wrong, x, w)  # its float64 copy has no hook
    assert off["trained"] == pytest.approx(0.01, rel=1e-3)
    assert off["y"] == right["y"]


def test_a_target_is_met_when_the_lower_end_of_the_interval_meets_it():
    maps = [nn.Linear(WIDTH, INSIDE)]

    def verdicts(**low: float) -> list[str]:
        results = {name.replace("_", " "): {"ratio": [at, at + 0.1, at + 0.2]} for name, at in low.items()}
        return [line.rpartition(" ")[2] for line in judged("lora", results, maps, WIDTH)]

    assert verdicts(frozen=1, ours=1.07) == ["met"]
    assert verdicts(frozen=1, ours=1.1) == ["missed"]
    assert verdicts(frozen=1, ours=1.1, PEFT_same_dtype=1.05) == ["met"]  # 1.15 - 0.02
    assert verdicts(ours_compiled=1.05, PEFT_compiled=1.1) == ["met"]
    assert verdicts(ours_compiled=1.05, PEFT_compiled=0.94) == ["missed"]
    rank, share = WIDTH // 4, WIDTH * (1 / WIDTH + 1 / INSIDE) / 4
    assert galore(maps, "galore", WIDTH) == pytest.approx(4 / 6 + share / 3 + 0.04)
    assert rank == 8


def test_runs_on_one_machine_add_to_one_file_and_another_begins_anew(tmp_path: Path):
    path, here = tmp_path / "numbers.json", {"machine": "one", "versions": {"torch": "2"}}
    keep(path, here, "lora", {"pairs": 3})
    keep(path, here, "dora", {"pairs": 4})
    keep(path, here, "lora", {"pairs": 5})
    assert json.loads(path.read_text()) == here | {"results": {"lora": {"pairs": 5}, "dora": {"pairs": 4}}}
    keep(path, here | {"machine": "two"}, "vera", {"pairs": 6})
    assert json.loads(path.read_text()) == {**here, "machine": "two", "results": {"vera": {"pairs": 6}}}


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path: Path, text: str):
    path = tmp_path / "numbers.json"
    path.write_text(text)
    for use in (lambda: kept(path), lambda: keep(path, {"machine": "one"}, "lora", {})):
        with pytest.raises(ValueError, match=r"Expecting|no results"):
            use()
    assert path.read_text() == text
