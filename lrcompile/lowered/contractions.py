"""In which order to contract a linear map and its low-rank pair: every order as a list of products, and their time.

    y = x·Wᵀ + S·(sB)ᵀ, S = x·Aᵀ           split:   the factors act on activations, 6Tr(i + o) beside 4Tio
    y = x·W'ᵀ, W' = W + sB·A               merged:  built once and kept for dx = dy·W', 4Tr(i + o) + 2ior beside 4Tio
    dB = dyᵀ·S, dA = dSᵀ·x, dS = dy·sB     by codes
    dB = s·G·Aᵀ, dA = (sB)ᵀ·G, G = dyᵀ·x   by G:    2Tio + 4ior in their place, for very large ranks

A product takes as long as its arithmetic or its traffic, whichever is more (the roofline); the least sum wins, and the
default, which keeps no W', against any that is not better by `MARGIN`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Order:
    """How a map with a pair beside it is computed; the default is right for every map."""

    merged: bool = False
    """The forward product and the input's gradient go through W + sBA."""
    by_weight: bool = False
    """The factors' gradients come from that of the weight, G."""


@dataclass(frozen=True)
class Shapes:
    """Of one map and its pair, and which gradients are wanted."""

    rows: int
    inside: int
    out: int
    rank: int
    wants_x: bool = True
    wants_A: bool = True
    wants_B: bool = True


@dataclass(frozen=True)
class Product:
    """`[rows, inner]`·`[inner, columns]`, into a buffer that is read first if it `accumulates`."""

    rows: int
    inner: int
    columns: int
    accumulates: bool = False

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inner * self.columns

    @property
    def elements(self) -> int:
        """That are read or written."""
        result = self.rows * self.columns
        return self.rows * self.inner + self.inner * self.columns + result * (2 if self.accumulates else 1)


@dataclass(frozen=True)
class Machine:
    """What products reach on it."""

    flops: float
    """A second."""
    bytes: float
    """Read or written in a second."""

    def seconds(self, product: Product, dtype: torch.dtype) -> float:
        return max(product.flops / self.flops, product.elements * dtype.itemsize / self.bytes)


MARGIN = 0.05
"""Of the time of one map. Less is within what the model leaves out: caches, and the expand in a product's epilogue."""
# Measured rates of one representative of each kind: two cores of a Zen 4 with torch's own products (float64 half of
# float32), and an H200 with cuBLAS, TF32 off. Only their ratio decides, and a choice is far from even in most shapes.
MACHINES = {
    ("cpu", torch.float64): Machine(9.3e10, 1.8e10),
    ("cpu", torch.float32): Machine(1.9e11, 1.8e10),
    ("cuda", torch.float64): Machine(5.4e13, 4.3e12),
    ("cuda", torch.float32): Machine(4.5e13, 4.3e12),
}
"""By kind of device and dtype. Others keep the default order: 16 bits would round sBA away in W + sBA."""


def products(shapes: Shapes, order: Order) -> Iterator[Product]:
    """Everything a training step multiplies for one map, forward and backward."""
    T, i, o, r = shapes.rows, shapes.inside, shapes.out, shapes.rank
    by_codes = not order.by_weight
    yield Product(T, i, o)
    if order.merged:
        yield Product(o, r, i, accumulates=True)
    else:
        yield Product(T, r, o, accumulates=True)
    if not order.merged or (by_codes and shapes.wants_B):
        yield Product(T, i, r)  # S
    if shapes.wants_x:
        yield Product(T, o, i)
        if not order.merged:
            yield Product(T, r, i, accumulates=True)
    if (by_codes and shapes.wants_A) or (shapes.wants_x and not order.merged):
        yield Product(T, o, r)  # dS
    if by_codes:
        if shapes.wants_B:
            yield Product(o, T, r)
        if shapes.wants_A:
            yield Product(r, T, i)
    elif shapes.wants_A or shapes.wants_B:
        yield Product(o, T, i)  # G
        if shapes.wants_B:
            yield Product(o, i, r)
        if shapes.wants_A:
            yield Product(r, o, i)


def flops(shapes: Shapes, order: Order) -> int:
    return sum(product.flops for product in products(shapes, order))


def seconds(shapes: Shapes, order: Order, machine: Machine, dtype: torch.dtype) -> float:
    return sum(machine.seconds(product, dtype) for product in products(shapes, order))


ORDERS = tuple(Order(merged, by_weight) for merged in (False, True) for by_weight in (False, True))


def cheapest(shapes: Shapes, machine: Machine, dtype: torch.dtype) -> Order:
    """The order of least time, where that is less than the default's by more than `MARGIN`."""
    best = min(ORDERS, key=lambda order: seconds(shapes, order, machine, dtype))
    allowed = (1 - MARGIN) * seconds(shapes, Order(), machine, dtype)
    return best if seconds(shapes, best, machine, dtype) < allowed else Order()
