"""The comparison of methods: what it tries, at which budget, and how it goes on after an interruption."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from zoo.every_method import METHODS

from lrcompile.benching.contenders import matched_rank, spec_of, trained
from lrcompile.benching.corpus import code, documentation, windows
from lrcompile.benching.running import RATES, Contender, Plan, bench, half_width
from lrcompile.benching.showing import draw, table
from lrcompile.benching.tasks import TASKS
from lrcompile.cli import main
from lrcompile.recipes import recipe


def model() -> Any:
    return nn.ModuleDict({"a": nn.Linear(40, 40), "b": nn.Linear(40, 96), "head": nn.Linear(96, 3)})


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_valid_spec_and_stays_within_the_budget(method):
    budget = trained("lora", model(), 8, ["head"])
    rank = matched_rank(method, model(), budget, ["head"])
    spec_of(method, rank=rank, steps=60, lr=1e-3, seed=0, head=["head"])
    count = trained(method, model(), rank, ["head"])
    if "rank" not in recipe(method).lacks:
        assert 0 < count <= budget
        larger = rank + 1
        if larger <= 40:
            assert trained(method, model(), larger, ["head"]) > budget or larger > 256


def contender(**sweep: float | None) -> Contender:
    found = {float(key[1:].replace("_", "-")): value for key, value in sweep.items()}
    return Contender("docstrings", "lora", 8, 100, True, found, [])


def test_a_sweep_starts_in_the_middle_and_walks_until_the_best_has_neighbours():
    each = contender()
    assert each.next_rates() == [1e-3, 3e-3, 1e-2]
    each.sweep = {1e-3: 0.5, 3e-3: 0.6, 1e-2: 0.4}
    assert each.next_rates() == []
    assert each.best() == 3e-3
    each.sweep = {1e-3: 0.5, 3e-3: 0.6, 1e-2: 0.7}
    assert each.next_rates() == [3e-2]
    each.sweep[3e-2] = 0.8
    assert each.next_rates() == [1e-1]
    each.sweep[1e-1] = None
    assert each.next_rates() == []


def test_a_method_that_diverges_everywhere_ends_at_the_smallest_rate():
    each = contender()
    each.sweep = dict.fromkeys([1e-3, 3e-3, 1e-2])
    assert each.best() is None
    assert each.next_rates() == [3e-4]
    each.sweep[3e-4] = None
    assert each.next_rates() == []
    assert min(RATES) == 3e-4


def test_the_interval_is_students():
    assert half_width([1.0]) is None
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(4.303 / math.sqrt(3))


def test_the_corpus_is_this_pythons_own_text():
    rows = windows(documentation(), 128)
    assert rows.shape[1] == 128
    assert len(rows) > 1000
    assert rows.dtype == torch.uint8
    assert b"import" in code()


def result() -> dict[str, Any]:
    row = {
        "rank": 8, "trained": 100, "sweep": {"0.001": 0.5}, "lr": 1e-3, "quality": [0.5, 0.6], "mean": 0.55,
        "half_width": 0.01,
        "step_ratio": (1.1, 1.2, 1.3), "optimizer_bytes": 10, "saved_bytes": 20, "checkpoint_bytes": 30,
    }  # fmt: skip
    frozen = {"rank": 1, "trained": 0, "sweep": {}, "lr": None, "quality": [], "mean": None, "half_width": None}
    worse = {**row, "mean": 0.4}
    found = {"metric": "accuracy", "higher_is_better": True, "methods": {"frozen": frozen, "b": worse, "lora": row},
             "skipped": {"bitfit": "no biases"}}  # fmt: skip
    return {"tasks": {"docstrings": found}}


def test_the_table_is_best_first_and_says_what_diverged():
    text = table("docstrings", result()["tasks"]["docstrings"])
    assert [line.split()[0] for line in text.splitlines()[3:6]] == ["lora", "b", "frozen"]
    assert "0.5500 ± 0.0100" in text
    assert "1.20 [1.10, 1.30]" in text
    assert "diverged" in text
    assert "bitfit is left out: no biases" in text


def test_the_picture_is_a_png(tmp_path):
    draw(result(), tmp_path / "m.png")
    assert (tmp_path / "m.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--methods", "lorra"], "did you mean 'lora'"),
        (["--tasks", "vision"], "choose from docstrings, documentation"),
        (["--steps", "1"], "--steps is 1"),
        (["--methods", ","], "names nothing"),
    ],
)
def test_wrong_options_are_one_line(arguments, said, capsys):
    assert main(["bench", "methods", *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_it_runs_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(TASKS["documentation"], "PRETRAINING", 3)
    plan = Plan(("lora", "vera"), ("documentation",), 10, 2, 2, 1)
    first = bench(plan, tmp_path, Console(file=sys.stderr))
    methods = first["tasks"]["documentation"]["methods"]
    assert set(methods) == {"frozen", "lora", "vera"}
    assert all(len(row["quality"]) == 2 for row in methods.values())
    assert methods["lora"]["checkpoint_bytes"] > methods["vera"]["optimizer_bytes"] > 0
    lines = Path(tmp_path / "trials.jsonl").read_text().splitlines()
    again = bench(plan, tmp_path, Console(file=sys.stderr))
    assert Path(tmp_path / "trials.jsonl").read_text().splitlines() == lines
    assert again["tasks"]["documentation"]["methods"]["lora"]["quality"] == methods["lora"]["quality"]
    json.dumps(again)
