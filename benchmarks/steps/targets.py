"""What a step is meant to cost at most, beside the same step of the frozen model (GaLore: of full fine-tuning)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from steps.variants import GALORE

EAGER_LORA, COMPILED_LORA, EAGER_DORA = 1.08, 1.06, 1.12
LESS_THAN_PEFT = 0.02


def judged(method: str, results: dict[str, Any], maps: list[nn.Linear], width: int) -> Iterator[str]:
    """A line for each target: met if the lower end of the interval meets it."""
    for name, ratio, limit in _limits(method, results, maps, width):
        low, middle, high = ratio
        verdict = "met" if low <= limit else "missed"
        yield f"target of {name}: at most {limit:.3f}; {middle:.3f} [{low:.3f}, {high:.3f}]: {verdict}"


def _limits(
    method: str, results: dict[str, Any], maps: list[nn.Linear], width: int
) -> Iterator[tuple[str, list[float], float]]:
    def middle(name: str) -> float:
        return float(results[name]["ratio"][1])

    if method == "lora" and "ours" in results:
        same = [name for name in ("PEFT same dtype", "PEFT") if name in results]
        bound = middle(same[0]) - LESS_THAN_PEFT if same else 0.0
        yield "ours", results["ours"]["ratio"], max(EAGER_LORA, bound)
    if method == "lora" and "ours compiled" in results:
        theirs = [name for name in results if name.startswith("PEFT") and name.endswith("compiled")]
        yield "ours compiled", results["ours compiled"]["ratio"], min([COMPILED_LORA, *map(middle, theirs)])
    if method == "dora" and "ours" in results:
        yield "ours", results["ours"]["ratio"], EAGER_DORA
    if method in GALORE and "ours" in results:
        yield "ours, a new projection now and then included", results["ours"]["amortised"], galore(maps, method, width)


def galore(maps: list[nn.Linear], method: str, width: int) -> float:
    """The share of a full step's multiplications that is left, 4/6 + r(1/i + 1/o)/3 of each map, and 0.04."""
    rank = width // GALORE[method]
    sizes = [(m.in_features, m.out_features) for m in maps]
    left = sum(i * o * (4 / 6 + rank * (1 / i + 1 / o) / 3) for i, o in sizes)
    return left / sum(i * o for i, o in sizes) + 0.04
