"""Factors between two diagonals, F' = s·diag(r)·F·diag(c): formed anew in each pass, and kept in none.

    dr = s·(dF' ⊙ F)·c,   dc = s·(dF' ⊙ F)ᵀ·r,   dF = s·diag(r)·dF'·diag(c)

The scale s of a pair goes into the diagonals of B where it has any.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from lrcompile.kernels.scaled_factor import ops
from lrcompile.lowered.operands import Operands


def formed(given: Operands, phase: int) -> Operands:
    """The same operands with every factor as it acts, and without the scales that these contain. None stays None."""
    codes, made, scales = len(given.As), given.factors, list(given.scales)
    for index, factor, rows, columns, scale in _between(given):
        made[index] = torch.ops.lrcompile_kernels.scaled_factor(factor, rows, columns, scale, phase)
        if index >= codes:
            scales[index - codes] = None
    return replace(given, As=made[:codes], Bs=made[codes:], scales=scales)


def through_diagonals(given: Operands, wanted: Operands, found: Operands) -> Operands:
    """The gradients of factors and diagonals, from those of the factors as they act."""
    codes, gradients, rows, columns = len(given.As), found.factors, list(found.rows), list(found.columns)
    for index, factor, r, c, scale in _between(given):
        gradient = gradients[index]
        if gradient is None:
            continue
        if wanted.rows[index] or wanted.columns[index]:
            vectors = iter(torch.ops.lrcompile_kernels.diagonal_gradients(gradient, factor, r, c, scale))
            rows[index], columns[index] = (None if each is None else next(vectors) for each in (r, c))
        own = (gradient, r, c, scale, ops.BACKWARD)
        gradients[index] = torch.ops.lrcompile_kernels.scaled_factor(*own) if wanted.factors[index] else None
    return replace(found, As=gradients[:codes], Bs=gradients[codes:], rows=rows, columns=columns)


def _between(given: Operands) -> Iterator[tuple[Any, ...]]:
    """Of each factor that is between diagonals its index, itself, both, and the scale that goes with it."""
    scales = [*[None] * len(given.As), *given.scales]
    each = zip(given.factors, given.rows, given.columns, scales, strict=True)
    for index, (factor, rows, columns, scale) in enumerate(each):
        if factor is not None and not rows is columns is None:
            yield index, factor, rows, columns, scale
