"""Measure one rung in a process of its own: `python -m lrcompile.demo.measuring FOLDER RUNG`.

It is loaded from the files the run wrote, so a rung is what a user would deploy, not what is left in the trainer's
memory.

- logits of every test text;
- latency: median milliseconds of a call on one fixed batch, after two calls to warm up;
- memory: peak resident memory of the process less what it held before loading (interpreter and libraries), in bytes.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lrcompile.demo.rungs import RUNGS, Rung
from lrcompile.errors import LrcompileError

CALLS = 15
TEST = "test.npz"


@dataclass(frozen=True)
class Measured:
    """`logits` float32 [test texts, classes]."""

    logits: np.ndarray
    latency_ms: float
    peak_bytes: int
    load_seconds: float


def measure(folder: Path, rung: Rung, batch_size: int) -> Measured:
    """Run `rung` in a fresh interpreter over `folder/test.npz`. Raises `LrcompileError` with what that process said
    last.
    """
    out = folder / f".{rung.key}.npz"
    command = [sys.executable, "-m", "lrcompile.demo.measuring", str(folder), rung.key, str(batch_size), str(out)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise LrcompileError(f"measuring {rung.title!r} failed: {said[-1] if said else f'exit code {done.returncode}'}")
    numbers = json.loads(done.stdout.strip().splitlines()[-1])
    with np.load(out) as saved:
        logits = saved["logits"]
    out.unlink()
    return Measured(logits, **numbers)


def _main(folder: Path, key: str, batch_size: int, out: Path) -> None:
    rung = RUNGS[key]
    with np.load(folder / TEST) as saved:
        ids, mask = saved["input_ids"], saved["attention_mask"]
    for library in (
        ("onnxruntime",) if key.endswith("onnx") else ("torch", "transformers.models.auto", "lrcompile.quantizing")
    ):
        importlib.import_module(library)
    before = _resident()
    started = time.perf_counter()
    predict = rung.load(folder)
    load_seconds = time.perf_counter() - started
    lengths = mask.sum(1)
    order = lengths.argsort(kind="stable")
    found = []
    for start in range(0, len(ids), batch_size):
        chunk = order[start : start + batch_size]
        width = int(lengths[chunk].max())
        found.append(predict(ids[chunk, :width], mask[chunk, :width]))
    logits = np.empty((len(ids), found[0].shape[1]), np.float32)
    logits[order] = np.concatenate(found)
    fixed = ids[:batch_size], mask[:batch_size]
    times = []
    for call in range(CALLS + 2):
        started = time.perf_counter()
        predict(*fixed)
        if call >= 2:
            times.append(time.perf_counter() - started)
    peak = _peak() - before
    np.savez(out, logits=logits)
    print(json.dumps({"latency_ms": 1000 * statistics.median(times), "peak_bytes": peak, "load_seconds": load_seconds}))


def _resident() -> int:
    return _status("VmRSS") or _maxrss()


def _peak() -> int:
    # Not ru_maxrss where there is a choice: Linux hands it down from the process that started this one.
    return _status("VmHWM") or _maxrss()


def _status(field: str) -> int:
    status = Path("/proc/self/status")
    if not status.is_file():
        return 0
    line = next(line for line in status.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def _maxrss() -> int:
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


if __name__ == "__main__":
    _main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
