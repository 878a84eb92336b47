"""Times of interleaved rounds, as ratios with what is known of them."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence


def interval(ratios: Sequence[float], rounds: int = 2000) -> list[float]:
    """Lower end, median, upper end of a 95 % bootstrap interval of the median."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(rounds))
    return [medians[int(0.025 * rounds)], statistics.median(ratios), medians[int(0.975 * rounds)]]


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]
