"""What a training step costs beside the same step of the frozen model: ours, eager and compiled, and PEFT's.

    python benchmarks/train_step.py [--models NAMES] [--methods NAMES] [--dtypes NAMES] [--variants NAMES] [--pairs 50]
                                    [--clock wall|cpu] [--json FILE]

A step is forward and backward; rank 16 on all linear maps (GaLore: a quarter or a sixteenth of the width), dropout 0,
evaluation mode, trained tensors written every fourth step. Each variant is divided by the frozen model's step of the
same round, eager by eager and compiled by compiled; GaLore by full fine-tuning of the same layers, since it trains
them, its renewal of the projection, due every 200 steps, timed apart. Rounds are interleaved in one process in random
order; ratios are medians with a 95 % bootstrap interval, p10 and p90. A target is met when the lower end meets it.

FLOPs are counted by torch's formulas over the operations of a step, bytes saved for backward exactly: of eager steps by
hooks, of compiled ones in the graphs that Inductor is given, a step's own input included. Peak memory is the most that
a step allocates beyond what was there. Compiling is timed from cold, without Inductor's caches on disk. Errors are
shares of the largest value, against true float64. Times depend on the clock and on the neighbours; the counts do not.
With one thread (OMP_NUM_THREADS=1) `--clock cpu` leaves out the time that other processes had the processor.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.mkdtemp())

import torch
from rich.console import Console
from rich.progress import track
from steps.cases import CASES, Case, build
from steps.measuring import measure
from steps.results import keep, kept
from steps.targets import judged
from steps.variants import METHODS, variants
from torch import nn

from lrcompile.tables import render

COLUMNS = (
    *("variant", "median ms", "ratio [95 %]", "p10", "p90", "GFLOP", "MiB saved", "MiB peak"),
    *("compile s", "error y", "error dx", "error trained"),
)

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    default = [case.name for case in CASES.values() if case.on_cpu or device == "cuda"]
    parser.add_argument("--models", nargs="+", choices=CASES, default=default, metavar="NAME", help=", ".join(CASES))
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=METHODS, metavar="NAME", help=", ".join(METHODS)
    )
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float32"), default=("bfloat16", "float32"))
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="only these and what they are divided by")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: of this process, for one thread alone")
    parser.add_argument("--pairs", type=int, default=50, help="interleaved rounds (default 50)")
    parser.add_argument("--json", type=Path, help="add every number to this file, after each table")
    options = parser.parse_args()
    if options.clock == "cpu" and torch.get_num_threads() > 1:
        parser.error("threads that wait use the CPU too: --clock cpu needs OMP_NUM_THREADS=1")
    if options.json:
        try:
            kept(options.json)
        except ValueError as error:
            parser.error(f"--json: {options.json} is no file of this benchmark's results ({error}); name another")
    here = {
        "machine": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
        "clock": options.clock,
    }
    _warm_up(device)
    for name in options.models:
        for dtype in options.dtypes:
            for method in options.methods:
                if CASES[name].methods and method not in CASES[name].methods:
                    continue
                key = f"{name} {dtype} {method}"
                result = _one(CASES[name], getattr(torch, dtype), method, device, options, key)
                if options.json:
                    keep(options.json, here, key, {"date": date.today().isoformat(), "pairs": options.pairs} | result)


def _processor() -> str:
    """As Linux names it, else as Python does."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _one(
    case: Case, dtype: torch.dtype, method: str, device: str, options: argparse.Namespace, title: str
) -> dict[str, Any]:
    random.seed(0)
    torch._dynamo.reset()
    model, x, w = build(case, dtype, device)
    chosen, missing = variants(model, method, case.width)
    if options.variants:
        asked = {each.name for each in chosen if each.name in options.variants}
        asked |= {each.beside for each in chosen if each.name in asked}
        chosen = [each for each in chosen if each.name in asked]
    console = Console(stderr=True)
    results = measure(
        chosen, x, w, options.pairs, lambda rounds: track(rounds, description=title, console=console),
        CLOCKS[options.clock],
    )  # fmt: skip
    maps = [module for module in model.modules() if isinstance(module, nn.Linear)]
    targets = [*judged(method, results, maps, case.width)] if method in case.targets and device == "cpu" else []
    notes = [f"without {label}: {reason}" for label, reason in missing.items()]
    says = f"{case.says}, {str(dtype).removeprefix('torch.')}, {method}"
    rows = [_row(*each) for each in results.items()]
    print(render(COLUMNS, rows, title=says, notes=[*targets, *notes]), end="\n\n")
    sys.stdout.flush()
    return results | {"targets": targets, "missing": missing}


def _row(name: str, one: dict[str, Any]) -> tuple[str, ...]:
    low, middle, high = one["ratio"]
    return (
        name,
        f"{one['median_ms']:.1f}",
        f"{middle:.3f} [{low:.3f}, {high:.3f}]",
        f"{one['p10']:.3f}",
        f"{one['p90']:.3f}",
        f"{one['flops'] / 1e9:.3f}",
        _mebibytes(one["saved_bytes"]),
        _mebibytes(one["peak_bytes"]),
        "-" if one["compile_seconds"] is None else f"{one['compile_seconds']:.1f}",
        *(f"{one['error'][key]:.1e}" if key in one["error"] else "-" for key in ("y", "dx", "trained")),
    )


def _mebibytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.2f}"


def _warm_up(device: str) -> None:
    """What the first compilation of a process pays once is no variant's."""
    x = torch.randn(4, 4, device=device, requires_grad=True)
    torch.compile(lambda x: torch.tanh(x @ x) * 2)(x).sum().backward()


if __name__ == "__main__":
    main()
