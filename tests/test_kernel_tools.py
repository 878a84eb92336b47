"""Kernels are chosen by measurement, once for each shape class; what is kept on disk is a hint, never an order."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from lrcompile.errors import LrcompileError
from lrcompile.kernel_tools import tuning
from lrcompile.kernel_tools.compiling import usage, usages
from lrcompile.kernel_tools.launches import config
from lrcompile.kernel_tools.shapes import ShapeClass, shape_class, storage
from lrcompile.kernel_tools.tuning import LARGEST_FILE, MARGIN, Tuner, Unfit, Way, folder, noise_like, run_fastest

CPU = torch.device("cpu")
ONE = shape_class("op", torch.bfloat16, 100, (7, 9), (3,), CPU)
OTHER = shape_class("op", torch.bfloat16, 100, (7, 10), (3,), CPU)


def way(name: str, *arguments: object) -> torch.Tensor:
    return torch.ones(3)


class Bench:
    """Ways whose time is written beside them, and a timer that reads it instead of a clock."""

    def __init__(self, **times: float | None):
        self.times, self.measured = times, 0

    def ways(self) -> dict[str, Way]:
        return {name: partial(way, name) for name in self.times}

    def timer(self, run: Callable[[], object]) -> float:
        assert isinstance(run, partial)
        self.measured += 1
        time = self.times[run.args[0]]
        if time is None:
            raise Unfit("too much shared memory")
        return time


def choose(tuner: Tuner, bench: Bench, shapes: ShapeClass = ONE) -> str:
    chosen = tuner.choose(shapes, bench.ways, (torch.empty(2, 2),))
    assert isinstance(chosen, partial)
    return chosen.args[0]


def fresh(bench: Bench, path: Path | None, shapes: ShapeClass = ONE) -> str:
    return choose(Tuner(path, bench.timer), bench, shapes)


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "kernels.json"


def test_the_fastest_way_is_chosen_and_measured_once():
    bench = Bench(aten=3.0, small=2.0, large=1.0)
    tuner = Tuner(None, bench.timer)
    assert [choose(tuner, bench) for _ in range(3)] == ["large"] * 3
    assert bench.measured == 3  # each way once


@pytest.mark.parametrize(("time", "chosen"), [(1 - MARGIN * 0.9, "aten"), (1 - MARGIN * 1.1, "small")])
def test_a_gain_within_the_margin_leaves_the_fallback(time: float, chosen: str):
    assert fresh(Bench(aten=1.0, small=time, large=2.0), None) == chosen


def test_a_way_the_device_cannot_run_is_passed_over():
    assert fresh(Bench(aten=3.0, small=2.0, large=None), None) == "small"


def test_each_shape_class_has_its_own_choice(stored: Path):
    assert fresh(Bench(aten=3.0, small=2.0, large=1.0), stored, ONE) == "large"
    assert fresh(Bench(aten=3.0, small=1.0, large=2.0), stored, OTHER) == "small"
    again = Bench(aten=0.0, small=9.0, large=9.0)
    assert fresh(again, stored, ONE) == "large"
    assert fresh(again, stored, OTHER) == "small"
    assert again.measured == 0


def test_without_a_timer_nothing_is_measured_and_what_was_stored_still_counts(stored: Path):
    bench = Bench(aten=3.0, small=2.0, large=1.0)
    fresh(bench, stored, ONE)
    silent = Tuner(stored, None)
    assert choose(silent, bench, ONE) == "large"
    assert choose(silent, bench, OTHER) == "aten"
    assert bench.measured == 3


def test_a_stored_name_that_no_longer_exists_is_measured_anew(stored: Path):
    fresh(Bench(aten=3.0, small=2.0, large=1.0), stored)
    assert fresh(Bench(aten=3.0, small=2.0), stored) == "small"
    assert json.loads(stored.read_text())["choices"] == {str(ONE): "small"}


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"\xff\xfe", b"[]", b"null", b"[" * 100_000, b"{}", b'{"schema": 2, "choices": {}}',
        b'{"schema": 1}', b'{"schema": 1, "choices": []}', b'{"schema": 1, "choices": {"a": 1}}',
        json.dumps({"schema": 1, "choices": {str(ONE): "aten"}}).encode() + b" " * LARGEST_FILE,
    ],
)  # fmt: skip
def test_a_foreign_or_broken_file_is_as_if_absent_and_then_replaced(stored: Path, content: bytes):
    stored.parent.mkdir()
    stored.write_bytes(content)
    assert fresh(Bench(aten=3.0, small=2.0, large=1.0), stored) == "large"
    assert json.loads(stored.read_text()) == {"schema": 1, "choices": {str(ONE): "large"}}


def test_two_processes_keep_each_others_choices(stored: Path):
    bench = Bench(aten=3.0, small=2.0, large=1.0)
    first, second = Tuner(stored, bench.timer), Tuner(stored, bench.timer)
    choose(first, bench, ONE)
    choose(second, bench, OTHER)
    assert set(json.loads(stored.read_text())["choices"]) == {str(ONE), str(OTHER)}


def test_a_folder_that_cannot_be_written_costs_a_warning_and_nothing_else(tmp_path: Path):
    (tmp_path / "file").write_text("")
    bench = Bench(aten=3.0, small=2.0, large=1.0)
    tuner = Tuner(tmp_path / "file" / "kernels.json", bench.timer)
    with pytest.warns(UserWarning, match="LRCOMPILE_CACHE"):
        assert choose(tuner, bench, ONE) == "large"
    assert choose(tuner, bench, OTHER) == "large"  # and says it once


def test_a_failing_kernel_is_an_error_and_not_a_slow_one():
    def broken(run: Callable[[], object]) -> float:
        raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        choose(Tuner(None, broken), Bench(aten=1.0, small=1.0, large=1.0))


def test_where_memory_does_not_hold_the_noise_the_fallback_runs_and_nothing_is_stored(stored: Path):
    tries = []

    def full(run: Callable[[], object]) -> float:
        tries.append(run)
        raise torch.OutOfMemoryError("CUDA out of memory")

    tuner = Tuner(stored, full)
    assert [choose(tuner, Bench(aten=1.0, small=1.0, large=1.0)) for _ in range(3)] == ["aten"] * 3
    assert len(tries) == 1
    assert not stored.exists()


def test_the_only_way_is_never_measured_and_a_choice_may_lie_within_a_way():
    alone = Bench(aten=3.0)
    tuner = Tuner(None, alone.timer)
    assert choose(tuner, alone) == "aten"
    assert alone.measured == 0

    inner = Bench(aten=3.0, small=2.0)
    tuner = Tuner(None, lambda run: float(run() is None))
    ways: dict[str, Way] = {"aten": lambda: torch.ones(3), "each": lambda: tuner.choose(OTHER, inner.ways, ())()}
    assert tuner.choose(ONE, lambda: ways, ()) is ways["aten"]


@pytest.mark.parametrize(
    ("wrong", "refused"),
    [
        (lambda y: y + 2**-9 * y.roll(1), False),  # rounding
        (lambda y: torch.cat([y[:-1], y[-1:] * 0]), True),  # the last tile never written
        (lambda y: y * torch.tensor([1.0] * 63 + [torch.nan]), True),
    ],
)
def test_a_kernel_that_computes_something_else_on_this_device_is_never_chosen(wrong: Callable, refused: bool):
    y = torch.linspace(1, 2, 64, dtype=torch.bfloat16)
    ways: dict[str, Way] = {"aten": lambda x: [y, y], "quick": lambda x: [y, wrong(y).to(y.dtype)]}
    times = iter([2.0, 1.0])
    tuner = Tuner(None, lambda run: next(times))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        chosen = tuner.choose(ONE, lambda: ways, (y,))
    assert (chosen is ways["aten"]) == refused == any("'quick' computes something else" in str(w.message) for w in said)


def test_what_runs_gets_the_arguments_and_what_is_measured_gets_noise(monkeypatch: pytest.MonkeyPatch):
    seen: list[torch.Tensor] = []

    def seeing(x: torch.Tensor, others: list[torch.Tensor | None]) -> torch.Tensor:
        seen.append(x)
        return x

    def timer(run: Callable[[], object]) -> float:
        run()
        return 1.0

    monkeypatch.setattr(tuning, "tuner", lambda: Tuner(None, timer))
    x = torch.zeros(3, 4)
    assert run_fastest(ONE, lambda: {"a": seeing, "b": seeing}, x, [None, x]) is x
    assert [bool(tensor.any()) for tensor in seen] == [True] * (len(seen) - 1) + [False]


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


@pytest.mark.parametrize(("rows", "rounded"), [(0, 0), (1, 1), (2, 2), (3, 4), (4096, 4096), (4097, 8192)])
def test_rows_are_rounded_up_to_a_power_of_two(rows: int, rounded: int):
    assert shape_class("op", torch.float32, rows, (5,), (), CPU).rows == rounded


def test_ranks_count_as_the_kernels_pad_them():
    def classes(rank: int) -> ShapeClass:
        return shape_class("op", torch.float32, 8, (5,), (rank,), CPU)

    assert classes(1) == classes(16) != classes(17)


def test_storage_says_in_which_order_matrices_load_in_vectors():
    matrix = torch.empty(32, 48)
    assert (
        storage((matrix, matrix.t(), matrix[:, 16:32], matrix[:, 1:17], torch.empty(32, 5), matrix[:, ::2])) == "rcrxxx"
    )
    assert storage((torch.empty(1, 1).expand(16, 16),)) == "x"


def test_random_data_keeps_storage_order_and_the_users_generator():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    noise, (codes, nothing) = noise_like([torch.empty(4, 6).t(), (torch.empty(50, dtype=torch.uint8), None)])
    assert noise.stride() == (1, 6)
    assert nothing is None
    assert noise.std() > 0.3
    assert codes.unique().numel() > 10
    assert torch.equal(torch.rand(3), expected)


def test_a_configuration_prints_as_what_it_is():
    assert str(config(8, 3, BLOCK_T=128, BLOCK_K=64)) == "BLOCK_T=128 BLOCK_K=64 warps=8 stages=3"


SPILLING = """
import torch, triton, triton.language as tl
from lrcompile.kernel_tools.launches import Launch, config

@triton.jit
def centred(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i)
    tl.store(y + i, value - tl.sum(value) / BLOCK)

def ahead_of_time(capability):
    x, y = torch.empty(2, 16384, device="meta")
    some = {block: config(1, 1, BLOCK=block) for block in (256, 16384)}
    return {str(block): Launch(centred, (1,), {"x": x, "y": y}, some[block]) for block in some}
"""


def test_registers_and_spills_are_read_from_what_was_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton")
    (tmp_path / "spilling.py").write_text(SPILLING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = usages("spilling", 80)
    assert found["256"].stack == 0
    assert found["256"].registers < 64
    assert found["16384"].stack > 1000  # 512 values a thread, which holds 255


def test_a_module_that_does_not_compile_is_an_error_that_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton")
    (tmp_path / "broken.py").write_text(SPILLING.replace("tl.sum(value)", "no_such_thing(value)"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(LrcompileError, match="no_such_thing"):
        usages("broken", 80)


def test_an_interpreted_kernel_is_refused_and_the_way_out_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton")
    (tmp_path / "interpreted.py").write_text(SPILLING)
    monkeypatch.syspath_prepend(str(tmp_path))
    launch = importlib.import_module("interpreted").ahead_of_time(80)["256"]
    with pytest.raises(LrcompileError, match="TRITON_INTERPRET=1"):
        usage(launch, 80)


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
