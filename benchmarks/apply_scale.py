"""What adapting a model costs by the number of its sites, ours and PEFT's side by side in one process.

    python benchmarks/apply_scale.py [--rounds 50] [--json FILE]

Llama models of the 1B, 8B, 70B and 405B class (883 linear maps), rank 16 on all of them but the head, twice:
  meta    real widths on the meta device, where no tensor has values: what apply, report and plan themselves take
  narrow  as many layers and the same names, 64 wide with real values: save, load and merge need them, and at real
          widths their time is that of moving the weights, whoever does it
On the meta device PEFT adapts with low_cpu_mem_usage=True, its quicker way, which makes no values either; "default",
in a tenth of the rounds, is without. Its load is `PeftModel.from_pretrained`. Ours also checks that the base is the
adapter's, waits for the disk when it saves, and measures each merge.

Times are medians over interleaved rounds, wall clock and CPU; ratios have a 95 % bootstrap interval. Memory is the
peak of what Python itself allocates, traced in a round of its own; tensors are not in it.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import random
import statistics
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.progress import track
from steps.ratios import interval
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lrcompile
from lrcompile.planning import plan
from lrcompile.tables import render

T = TypeVar("T")
TARGET = 0.2
"""Seconds for apply and report together at the largest."""
RANK, ALPHA = 16, 32
SIZES = {
    "1B": {"num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32},
    "8B": {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32},
    "70B": {"num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64},
    "405B": {"num_hidden_layers": 126, "hidden_size": 16384, "intermediate_size": 53248, "num_attention_heads": 128},
}
NARROW = {"hidden_size": 64, "intermediate_size": 112, "num_attention_heads": 8, "vocab_size": 128}
SPEC = lrcompile.spec("lora", rank=RANK, alpha=ALPHA)


class Times:
    """Seconds of every operation, by its name: wall clock and CPU."""

    def __init__(self) -> None:
        self.wall: dict[str, list[float]] = {}
        self.cpu: dict[str, list[float]] = {}

    def __call__(self, name: str, operation: Callable[[], T]) -> T:
        wall, cpu = time.perf_counter(), time.process_time()
        result = operation()
        self.cpu.setdefault(name, []).append(time.process_time() - cpu)
        self.wall.setdefault(name, []).append(time.perf_counter() - wall)
        return result


class Peaks:
    """Bytes that Python allocates at most beside what there was before, by operation."""

    def __init__(self) -> None:
        self.bytes: dict[str, int] = {}

    def __call__(self, name: str, operation: Callable[[], T]) -> T:
        tracemalloc.start()
        try:
            result = operation()
            self.bytes[name] = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        return result


Meter = Times | Peaks


def llama(size: str, *, narrow: bool) -> nn.Module:
    config = LlamaConfig(**SIZES[size] | {"vocab_size": 128256, "num_key_value_heads": 8} | (NARROW if narrow else {}))
    with torch.device("cpu" if narrow else "meta"):
        return LlamaForCausalLM(config).eval()


def ours(model: nn.Module, measured: Meter, folder: Path, narrow: bool) -> None:
    measured("plan", lambda: plan(model, SPEC))
    measured("apply", lambda: lrcompile.apply(model, SPEC))
    measured("report", lambda: lrcompile.report(model))
    if narrow:
        fill(model, "lrcompile_adapters")
        measured("save", lambda: lrcompile.save(model, folder))
        measured("merge", lambda: lrcompile.merge(model))
        measured("unmerge", lambda: lrcompile.unmerge(model))
    measured("remove", lambda: lrcompile.remove(model))
    if narrow:
        measured("load", lambda: lrcompile.load(model, folder))


def theirs(model: Any, measured: Meter, folder: Path, narrow: bool) -> None:
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    adapted: Any = measured("apply", lambda: get_peft_model(model, config, low_cpu_mem_usage=not narrow))
    if narrow:
        fill(adapted, "lora_")
        measured("save", lambda: adapted.save_pretrained(folder))
        measured("merge", adapted.merge_adapter)
        measured("unmerge", adapted.unmerge_adapter)
    base = measured("remove", adapted.unload)
    if narrow:
        measured("load", lambda: PeftModel.from_pretrained(base, folder))


def theirs_by_default(model: Any, measured: Meter, folder: Path, narrow: bool) -> None:
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    measured("apply", lambda: get_peft_model(model, config))


RARE = "peft default"
CONTENDERS = {"lrcompile": ours, "peft": theirs, RARE: theirs_by_default}


def fill(model: nn.Module, mark: str) -> None:
    """Factors as after training: B is not 0."""
    for name, parameter in model.named_parameters():
        if mark in name:
            nn.init.normal_(parameter, std=0.02)


def contenders(narrow: bool) -> list[str]:
    return [name for name in CONTENDERS if not (narrow and name == RARE)]


def measure(size: str, *, narrow: bool, rounds: int) -> dict[str, Any]:
    names = contenders(narrow)
    times = {name: Times() for name in names}
    peaks = {name: Peaks() for name in names}

    def run(name: str, measured: Meter) -> None:
        gc.collect()  # of the run before; within one the collector is on, as it is for users
        with tempfile.TemporaryDirectory() as folder:
            CONTENDERS[name](llama(size, narrow=narrow), measured, Path(folder, "adapter"), narrow)

    for name in names:
        run(name, Times())  # imports, classes made once
        run(name, peaks[name])
    label = f"{size} {'narrow' if narrow else 'meta'}"
    for turn in track(range(rounds), description=label, console=Console(stderr=True)):
        turns = [name for name in names if name != RARE or turn % 10 == 0]
        for name in random.sample(turns, len(turns)):
            run(name, times[name])
    wall, cpu = times["lrcompile"].wall, times["lrcompile"].cpu
    for seconds in (wall, cpu):
        seconds["apply and report"] = [a + b for a, b in zip(seconds["apply"], seconds["report"], strict=True)]
    found: dict[str, Any] = {"sites": 7 * SIZES[size]["num_hidden_layers"] + 1, "operations": {}}
    for operation, seconds in wall.items():
        one: dict[str, Any] = {}
        for name in names:
            if operation in times[name].wall:
                one[name] = {
                    "wall_ms": [1e3 * each for each in interval(times[name].wall[operation])],
                    "cpu_ms": 1e3 * statistics.median(times[name].cpu[operation]),
                    "python_peak_bytes": peaks[name].bytes.get(operation),
                }
        theirs_of = times["peft"].wall.get("apply" if operation == "apply and report" else operation)
        if theirs_of:
            one["ours_over_peft"] = interval([a / b for a, b in zip(seconds, theirs_of, strict=True)])
        found["operations"][operation] = one
    return found


def rows(results: dict[str, Any]) -> list[tuple[object, ...]]:
    out = []
    for track_name, sizes in results.items():
        for size, found in sizes.items():
            for operation, one in found["operations"].items():
                mine, other = one["lrcompile"], one.get("peft")
                memory = mine["python_peak_bytes"]
                ratio = one.get("ours_over_peft")
                out.append(
                    (
                        track_name,
                        size,
                        found["sites"],
                        operation,
                        f"{mine['wall_ms'][1]:.1f}",
                        f"{mine['cpu_ms']:.1f}",
                        f"{1e3 * mine['cpu_ms'] / found['sites']:.0f}",
                        f"{memory / 1024 / found['sites']:.1f}" if memory else "",
                        f"{other['wall_ms'][1]:.1f}" if other else "",
                        f"{other['python_peak_bytes'] / 1024 / found['sites']:.1f}" if other else "",
                        f"{ratio[1]:.3f} [{ratio[0]:.3f}, {ratio[2]:.3f}]" if ratio else "",
                    )
                )
    return out


def per_site(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """By operation: CPU time a site at 405B over that at 8B; 1 where the time is linear in the number of sites."""
    out: dict[str, dict[str, float]] = {}
    for name, sizes in results.items():
        small, large = sizes["8B"], sizes["405B"]
        for operation, one in large["operations"].items():
            before = small["operations"][operation]["lrcompile"]["cpu_ms"] / small["sites"]
            out.setdefault(name, {})[operation] = one["lrcompile"]["cpu_ms"] / large["sites"] / before
    return out


def machine() -> dict[str, object]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "processor": processor or platform.processor(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft", "lrcompile")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50, help="interleaved rounds (default 50)")
    parser.add_argument("--json", type=Path, help="write every number here too")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="peft")
    torch.manual_seed(0)
    random.seed(0)
    results = {
        name: {size: measure(size, narrow=narrow, rounds=options.rounds) for size in SIZES}
        for name, narrow in (("meta", False), ("narrow", True))
    }
    columns = ("model", "class", "sites", "operation", "ms", "CPU ms", "CPU µs/site", "KiB/site")
    columns += ("PEFT ms", "PEFT KiB/site", "ours / PEFT [95 %]")
    grown = per_site(results)
    taken = results["meta"]["405B"]["operations"]["apply and report"]["lrcompile"]
    low, middle, high = (each / 1e3 for each in taken["wall_ms"])
    default = results["meta"]["405B"]["operations"]["apply"][RARE]
    met = "met" if low <= TARGET else "missed"
    notes = [
        f"apply and report at 883 sites: {middle:.3f} s [{low:.3f}, {high:.3f}], CPU {taken['cpu_ms'] / 1e3:.3f} s;"
        f" target {TARGET} s: {met}",
        f"{RARE}: {default['wall_ms'][1] / 1e3:.2f} s, CPU {default['cpu_ms'] / 1e3:.2f} s",
        *(
            f"{name}: CPU time a site at 405B over that at 8B: "
            + ", ".join(f"{operation} {ratio:.2f}" for operation, ratio in of.items())
            for name, of in grown.items()
        ),
        ", ".join(f"{key} {value}" for key, value in machine().items()),
    ]
    print(render(columns, rows(results), notes=notes))
    if options.json:
        found = {"machine": machine(), "rounds": options.rounds, "per_site_405B_over_8B": grown, **results}
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
