"""Forward and backward of one Llama-3-8B layer, bf16, rank 16, over the frozen layer's, variants taken in turn.

PEFT where it is installed. `benchmarks/train_step.py` has more incumbents, and measures what is saved and launched.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import lrcompile
import lrcompile.backend
from gpu.layers import LLAMA_8B, TINY, Layers, Sizes, batch
from gpu.section import Section

METHODS: dict[str, dict[str, Any]] = {"lora": {"alpha": 32}, "dora": {"alpha": 32}, "qlora": {"alpha": 32}}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PAIRS = 50


def main() -> None:
    section = Section()
    sizes, lengths = (TINY, (5,)) if section.dry else (LLAMA_8B, (8192, 512))
    for rows in lengths:
        for method in METHODS:
            if section.over(f"{method} {rows}"):
                return
            torch.compiler.reset()
            _compare(section, method, sizes, rows)


def _compare(section: Section, method: str, sizes: Sizes, rows: int) -> None:
    options = {"inner": "aot_eager"} if section.dry else {}
    frozen, frozen_compiled = _frozen(section, sizes), _frozen(section, sizes)
    ours, ours_compiled = _adapted(section, sizes, method), _adapted(section, sizes, method)
    inner: Any = "aot_eager" if section.dry else "inductor"
    runs: dict[str, tuple[nn.Module, Any]] = {
        "frozen": (frozen, frozen),
        "frozen compiled": (frozen_compiled, torch.compile(frozen_compiled, backend=inner)),
        "ours": (ours, ours),
        "ours compiled": (
            ours_compiled,
            torch.compile(ours_compiled, backend=lrcompile.backend.lrcompile, options=options),
        ),
    }
    if method == "lora" and importlib.util.find_spec("peft") is not None:
        for dtype in ("float32", "bfloat16"):
            theirs = _peft(_frozen(section, sizes), dtype == "float32")
            runs[f"PEFT {dtype}"] = (theirs, theirs)
            if not section.dry:
                theirs = _peft(_frozen(section, sizes), dtype == "float32")
                runs[f"PEFT {dtype} compiled"] = (theirs, torch.compile(theirs))
    given = batch(sizes, rows, torch.bfloat16, section.device)
    steps = {name: _step(model, call, given) for name, (model, call) in runs.items()}
    compiling = {name: _seconds(section, step) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(2 if section.dry else PAIRS + 5):
        for name, step in steps.items():
            taken = _seconds(section, step)
            if number >= 5 or section.dry:
                times[name].append(taken)
        if number >= 15 and section.left < 20:
            break
    for name, taken in times.items():
        base = "frozen compiled" if "compiled" in name else "frozen"
        ratios = sorted(one / other for one, other in zip(taken, times[base], strict=True))
        low, high = _interval(ratios)
        section.row(
            method=method, rows=rows, variant=name, ms=1e3 * statistics.median(taken), over=base, pairs=len(ratios),
            ratio=statistics.median(ratios), low=low, high=high, first_s=compiling[name],
            peak_bytes=_peak(section, steps[name]),
        )  # fmt: skip


def _frozen(section: Section, sizes: Sizes) -> nn.Module:
    torch.manual_seed(0)
    return Layers(sizes, 1).to(section.device, torch.bfloat16).requires_grad_(False)


def _adapted(section: Section, sizes: Sizes, method: str) -> nn.Module:
    return lrcompile.apply(_frozen(section, sizes), lrcompile.spec(method, rank=16, seed=1, **METHODS[method]))


def _peft(model: nn.Module, wide: bool) -> Any:
    import peft

    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=PROJECTIONS)
    return peft.get_peft_model(model, config, autocast_adapter_dtype=wide)  # type: ignore[arg-type]


def _step(model: nn.Module, call: Any, given: dict[str, torch.Tensor]) -> Callable[[], None]:
    def step() -> None:
        model.zero_grad()
        given["x"].grad = None  # the frozen layer's backward pass computes it too
        call(**given)["loss"].backward()

    return step


def _seconds(section: Section, step: Callable[[], None]) -> float:
    if not section.dry:
        torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    if not section.dry:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _peak(section: Section, step: Callable[[], None]) -> int | None:
    """Above what is there before the step."""
    if section.dry:
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _interval(ratios: list[float]) -> tuple[float, float]:
    """95 % of the median, from order statistics."""
    n = len(ratios)
    reach = 0.98 * n**0.5
    low, high = int(max(0, n / 2 - reach)), int(min(n - 1, n / 2 + reach))
    return ratios[low], ratios[high]


if __name__ == "__main__":
    main()
