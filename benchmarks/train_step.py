"""What a training step costs beside the same step of the frozen model: ours, eager and compiled, and PEFT's.

    python benchmarks/train_step.py [--models NAMES] [--methods NAMES] [--dtypes NAMES] [--pairs 50] [--json FILE]

A step is forward and backward; rank 16 on all linear maps (GaLore: a quarter of the width), dropout 0, evaluation mode,
trained tensors written every fourth step. Each variant is divided by the frozen model's step of the same round, eager
by eager and compiled by compiled; GaLore by full fine-tuning of the same layers, since it trains them. Rounds are
interleaved in one process in random order; ratios are medians with a 95 % bootstrap interval, p10 and p90.

FLOPs are counted by torch's formulas over the operations of a step, bytes saved for backward exactly: of eager steps by
hooks, of compiled ones in the graphs that Inductor is given, a step's own input included. Peak memory is the most that
a step allocates beyond what was there. Compiling is timed from cold, without Inductor's caches on disk. Times depend on
the clock and on the neighbours; the counts do not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.mkdtemp())

import torch
from rich.console import Console
from rich.progress import track
from steps.cases import CASES, build
from steps.measuring import measure
from steps.variants import METHODS, variants

from lrcompile.tables import render

COLUMNS = (
    *("variant", "median ms", "ratio [95 %]", "p10", "p90", "GFLOP", "MiB saved", "MiB peak"),
    *("compile s", "error y", "error dx"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    default = [case.name for case in CASES.values() if case.on_cpu or device == "cuda"]
    parser.add_argument("--models", nargs="+", choices=CASES, default=default, metavar="NAME", help=", ".join(CASES))
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=METHODS, metavar="NAME", help=", ".join(METHODS)
    )
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float32"), default=("bfloat16", "float32"))
    parser.add_argument("--pairs", type=int, default=50, help="interleaved rounds (default 50)")
    parser.add_argument("--json", type=Path, help="write every number here, after each table")
    options = parser.parse_args()
    found: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
        "pairs": options.pairs,
        "results": {},
    }
    _warm_up(device)
    for name in options.models:
        for dtype in options.dtypes:
            for method in options.methods:
                key = f"{name} {dtype} {method}"
                results, missing = _one(name, getattr(torch, dtype), method, device, options.pairs, key)
                found["results"][key] = results | {"missing": missing}
                if options.json:
                    options.json.write_text(json.dumps(found, indent=1) + "\n")


def _one(
    name: str, dtype: torch.dtype, method: str, device: str, pairs: int, title: str
) -> tuple[dict[str, Any], dict[str, str]]:
    random.seed(0)
    torch._dynamo.reset()
    model, x, w = build(CASES[name], dtype, device)
    chosen, missing = variants(model, method, CASES[name].shape[-1])
    console = Console(stderr=True)
    results = measure(chosen, x, w, pairs, lambda rounds: track(rounds, description=title, console=console))
    notes = [f"without {label}: {reason}" for label, reason in missing.items()]
    says = f"{CASES[name].says}, {str(dtype).removeprefix('torch.')}, {method}"
    print(render(COLUMNS, [_row(*each) for each in results.items()], title=says, notes=notes), end="\n\n")
    sys.stdout.flush()
    return results, missing


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
        *(f"{one['error'][key]:.1e}" if key in one["error"] else "-" for key in ("y", "dx")),
    )


def _mebibytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.2f}"


def _warm_up(device: str) -> None:
    """What the first compilation of a process pays once is no variant's."""
    x = torch.randn(4, 4, device=device, requires_grad=True)
    torch.compile(lambda x: torch.tanh(x @ x) * 2)(x).sum().backward()


if __name__ == "__main__":
    main()
