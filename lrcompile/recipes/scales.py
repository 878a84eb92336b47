"""Scale rules: s from a spec, and the rank and alpha of one site."""

from __future__ import annotations

import math
from typing import Any


def alpha_over_rank(spec: Any, rank: int, alpha: float) -> float:
    """s = alpha/rank, or alpha/√rank (rsLoRA, arXiv 2312.03732), as `spec.scaling` says."""
    return alpha / (rank if spec.scaling == "alpha/r" else math.sqrt(rank))


def one(spec: Any, rank: int, alpha: float) -> float:
    """s = 1: the method's own tensors carry the scale."""
    return 1.0


def initial_rank(spec: Any, rank: int, alpha: float) -> float:
    """s = alpha/(rank + 1e-5), rank being the one a site starts with, whatever it keeps of it (arXiv 2303.10512)."""
    return alpha / (rank + 1e-5)
