"""Kernels are chosen by measurement, once for each shape class; what is kept on disk is a hint, never an order."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lrcompile.kernel_tools.launches import config
from lrcompile.kernel_tools.shapes import ShapeClass, shape_class
from lrcompile.kernel_tools.tuning import LARGEST_FILE, MARGIN, Tuner, Unfit, Way, folder, random_like

CPU = torch.device("cpu")
ONE = shape_class("op", torch.bfloat16, 100, (7, 9), (3,), CPU)
OTHER = shape_class("op", torch.bfloat16, 100, (7, 10), (3,), CPU)
NAMES = ("aten", "small", "large")


class Bench:
    """Ways whose time is written beside them, and a timer that reads it instead of a clock."""

    def __init__(self, **times: float | None):
        self.times, self.measured = times, 0

    def prepare(self) -> dict[str, Way]:
        self.measured += 1
        return {name: lambda name=name: name for name in self.times}  # type: ignore[misc]

    def timer(self, way: Way) -> float:
        time = self.times[str(way())]
        if time is None:
            raise Unfit("too much shared memory")
        return time


def choose(bench: Bench, path: Path | None, shapes: ShapeClass = ONE, names: tuple[str, ...] = NAMES) -> str:
    return Tuner(path, bench.timer).choose(shapes, names, bench.prepare)


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "kernels.json"


def test_the_fastest_way_is_chosen_and_measured_once():
    bench = Bench(aten=3.0, small=2.0, large=1.0)
    tuner = Tuner(None, bench.timer)
    assert [tuner.choose(ONE, NAMES, bench.prepare) for _ in range(3)] == ["large"] * 3
    assert bench.measured == 1


@pytest.mark.parametrize(("time", "chosen"), [(1 - MARGIN * 0.9, "aten"), (1 - MARGIN * 1.1, "small")])
def test_a_gain_within_the_margin_leaves_the_fallback(time: float, chosen: str):
    assert choose(Bench(aten=1.0, small=time, large=2.0), None) == chosen


def test_a_way_the_device_cannot_run_is_passed_over():
    assert choose(Bench(aten=3.0, small=2.0, large=None), None) == "small"


def test_each_shape_class_has_its_own_choice(stored: Path):
    assert choose(Bench(aten=3.0, small=2.0, large=1.0), stored, ONE) == "large"
    assert choose(Bench(aten=3.0, small=1.0, large=2.0), stored, OTHER) == "small"
    again = Bench(aten=0.0, small=9.0, large=9.0)
    assert choose(again, stored, ONE) == "large"
    assert choose(again, stored, OTHER) == "small"
    assert again.measured == 0


def test_without_a_timer_nothing_is_measured_and_what_was_stored_still_counts(stored: Path):
    bench = Bench(aten=3.0, small=2.0, large=1.0)
    choose(bench, stored, ONE)
    silent = Tuner(stored, None)
    assert silent.choose(ONE, NAMES, bench.prepare) == "large"
    assert silent.choose(OTHER, NAMES, bench.prepare) == "aten"
    assert bench.measured == 1


def test_a_stored_name_that_no_longer_exists_is_measured_anew(stored: Path):
    choose(Bench(aten=3.0, small=2.0, large=1.0), stored)
    assert choose(Bench(aten=3.0, small=2.0), stored, names=("aten", "small")) == "small"
    assert json.loads(stored.read_text())["choices"] == {str(ONE): "small"}


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"\xff\xfe", b"[]", b"null", b"[" * 100_000, b"{}", b'{"schema": 2, "choices": {}}',
        b'{"schema": 1}', b'{"schema": 1, "choices": []}', b'{"schema": 1, "choices": {"a": 1}}',
        b" " * (LARGEST_FILE + 1) + b"{}",
    ],
)  # fmt: skip
def test_a_foreign_or_broken_file_is_as_if_absent_and_then_replaced(stored: Path, content: bytes):
    stored.parent.mkdir()
    stored.write_bytes(content)
    assert choose(Bench(aten=3.0, small=2.0, large=1.0), stored) == "large"
    assert json.loads(stored.read_text()) == {"schema": 1, "choices": {str(ONE): "large"}}


def test_two_processes_keep_each_others_choices(stored: Path):
    bench = Bench(aten=3.0, small=2.0, large=1.0)
    first, second = Tuner(stored, bench.timer), Tuner(stored, bench.timer)
    first.choose(ONE, NAMES, bench.prepare)
    second.choose(OTHER, NAMES, bench.prepare)
    assert set(json.loads(stored.read_text())["choices"]) == {str(ONE), str(OTHER)}


def test_a_folder_that_cannot_be_written_costs_a_warning_and_nothing_else(tmp_path: Path):
    (tmp_path / "file").write_text("")
    bench = Bench(aten=3.0, small=2.0, large=1.0)
    tuner = Tuner(tmp_path / "file" / "kernels.json", bench.timer)
    with pytest.warns(UserWarning, match="LRCOMPILE_CACHE"):
        assert tuner.choose(ONE, NAMES, bench.prepare) == "large"
    assert tuner.choose(OTHER, NAMES, bench.prepare) == "large"  # and says it once


def test_a_failing_kernel_is_an_error_and_not_a_slow_one():
    def broken(way: Way) -> float:
        raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        Tuner(None, broken).choose(ONE, NAMES, Bench(aten=1.0, small=1.0, large=1.0).prepare)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"LRCOMPILE_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/lrcompile"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/h"}, "/h/.cache/lrcompile"),
        ({"HOME": "/h"}, "/h/.cache/lrcompile"),
    ],
)
def test_the_folder_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: str
):
    for name in ("LRCOMPILE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert folder() == Path(expected)


@pytest.mark.parametrize(("rows", "rounded"), [(0, 1), (1, 1), (2, 2), (3, 4), (4096, 4096), (4097, 8192)])
def test_rows_are_rounded_up_to_a_power_of_two(rows: int, rounded: int):
    assert shape_class("op", torch.float32, rows, (5,), (), CPU).rows == rounded


def test_ranks_count_as_the_kernels_pad_them():
    def classes(rank: int) -> ShapeClass:
        return shape_class("op", torch.float32, 8, (5,), (rank,), CPU)

    assert classes(1) == classes(16) != classes(17)


def test_random_data_keeps_storage_order_and_the_users_generator():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    noise, codes = random_like([torch.empty(4, 6).t(), torch.empty(50, dtype=torch.uint8)])
    assert noise.stride() == (1, 6)
    assert noise.std() > 0.3
    assert codes.unique().numel() > 10
    assert torch.equal(torch.rand(3), expected)


def test_a_configuration_prints_as_what_it_is():
    assert str(config(8, 3, BLOCK_T=128, BLOCK_K=64)) == "BLOCK_T=128 BLOCK_K=64 warps=8 stages=3"


def test_without_triton_everything_but_the_kernels_themselves_imports():
    code = """
import sys
sys.modules["triton"] = None
import torch
import lrcompile.kernel_tools.compiling, lrcompile.kernel_tools.tuning
import lrcompile.kernels.lora_linear.ops, lrcompile.kernels.lora_group.ops
x = torch.ones(2, 2)
print(torch.ops.lrcompile_kernels.sum_of_products([x, x], [x, x], None).sum().item())"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "16.0", run.stderr
