"""Factors that start from what comes into the map."""

from __future__ import annotations

from lrcompile.recipes.forms.adapter import Start
from lrcompile.recipes.forms.pair import LoraAdapter


def eva(adapter: LoraAdapter, start: Start) -> None:
    """A = the measured directions `[rank, in]`, orthonormal rows; B = 0  (arXiv 2410.07170)."""
    adapter.A.copy_(start.measured)
    adapter.B.zero_()
