"""Factors and NF4 codes of one weight, found in turn so that dq(Q) + s·B·A comes close to W.

    Q = nf4(W − s·B·A)          s·B·A = the largest r triplets of W − dq(Q)

A turn need not come closer (block maxima move with what they hold), so the closest of all is taken: more `iterations`
never give a larger ‖W − dq(Q) − s·B·A‖. Block maxima stay exact within the turns; what double quantization then takes
of them is about 3e-4 of the error of NF4 itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

from torch import Tensor

from lrcompile.kernels.nf4_dequant import Nf4, dequantize_nf4, quantize_nf4
from lrcompile.recipes.forms.adapter import Start
from lrcompile.recipes.initialisers.svd import Triplets, largest, split, weight_of

Turn = tuple[Triplets, Tensor, float]
"""The triplets of s·B·A, what was quantized, and how far both together are from W."""
Turns = Callable[[Tensor, Callable[[Tensor], Triplets], Callable[[Tensor], Tensor]], Iterator[Turn]]


def qpissa(adapter: Any, start: Start) -> None:
    """The factors of W first, and the codes of what they leave last  (arXiv 2404.02948)."""
    _settle(adapter, start, _factors_first)


def loftq(adapter: Any, start: Start) -> None:
    """The codes of W first, and the factors of what they lose last  (arXiv 2310.08659).

    s·B·A is that part for any scale s. (PEFT leaves s out, so that its start is right for alpha = r only.)
    """
    _settle(adapter, start, _codes_first)


def _settle(adapter: Any, start: Start, turns: Turns) -> None:
    spec, weight = start.spec, weight_of(adapter, start)
    factors = partial(largest, rank=adapter.rank, niter=spec.niter, generator=start.generator)
    all_turns = islice(turns(weight, factors, partial(_rounded, start)), spec.iterations)
    triplets, source, _ = min(all_turns, key=lambda turn: turn[2])
    split(adapter, *triplets)
    start.codes = _codes(start, source, spec.double_quant)


def _factors_first(
    weight: Tensor, factors: Callable[[Tensor], Triplets], rounded: Callable[[Tensor], Tensor]
) -> Iterator[Turn]:
    lost = weight
    while True:
        triplets = factors(lost)
        part = _product(triplets)
        source = weight - part
        lost = weight - rounded(source)
        yield triplets, source, float((lost - part).norm())


def _codes_first(
    weight: Tensor, factors: Callable[[Tensor], Triplets], rounded: Callable[[Tensor], Tensor]
) -> Iterator[Turn]:
    source = weight
    while True:
        lost = weight - rounded(source)
        triplets = factors(lost)
        part = _product(triplets)
        yield triplets, source, float((lost - part).norm())
        source = weight - part


def _product(triplets: Triplets) -> Tensor:
    U, S, Vh = triplets
    return (U * S[..., None, :]) @ Vh


def _codes(start: Start, weight: Tensor, double_quant: bool) -> Nf4:
    """Blocks run along rows as the weight is stored, which for `Conv1D` is `[in, out]`."""
    return quantize_nf4(weight.mT if start.site.transposed else weight, start.spec.block_size, double_quant)


def _rounded(start: Start, weight: Tensor) -> Tensor:
    """dq(nf4(weight)), maxima exact."""
    shape = weight.mT.shape if start.site.transposed else weight.shape
    values = dequantize_nf4(_codes(start, weight, False), shape, start.spec.block_size, weight.dtype)
    return values.mT if start.site.transposed else values
