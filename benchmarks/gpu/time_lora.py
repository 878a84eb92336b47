"""A linear map with a pair of rank 16 beside it, and groups of them, against their floor and the frozen product alone.

The floor is the longer of FLOPs over the measured peak and of bytes, each operand once, over the measured copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu.operands import DRY_GROUPS, DRY_ROWS, DRY_SHAPES, GROUPS, RANK, ROWS, SHAPES, random
from gpu.section import Section
from gpu.timing import Floor, copies, measure
from lrcompile.kernels.lora_group import ops as group_ops

OPS = torch.ops.lrcompile_kernels
assert group_ops, "importing it registers the ops"


def main() -> None:
    section = Section()
    floor = Floor(section.earlier("ceilings"))
    for rows in reversed(DRY_ROWS if section.dry else ROWS):  # training sizes first
        for name, (inner, out) in (DRY_SHAPES if section.dry else SHAPES).items():
            if section.over(f"{name} {rows}"):
                return
            _times(section, floor, name, rows, inner, (out,))
        for name, (inner, outs) in (DRY_GROUPS if section.dry else GROUPS).items():
            if section.over(f"{name} {rows}"):
                return
            _times(section, floor, name, rows, inner, outs)


def _times(section: Section, floor: Floor, name: str, rows: int, inner: int, outs: tuple[int, ...]) -> None:
    make = partial(random, dtype=torch.bfloat16, device=section.device)
    wide = sum(outs)
    sets = copies(2 * inner * wide, section.dry)
    given = [_Operands(make, rows, inner, outs) for _ in range(sets)]
    product, pair = 2 * rows * inner * wide, 2 * rows * RANK * wide
    weights, low = inner * wide, RANK * wide
    forward = 2 * (rows * inner + weights + low + rows * len(outs) * RANK + rows * wide)
    backward = 2 * (rows * wide + weights + rows * len(outs) * RANK + RANK * len(outs) * inner + rows * inner)
    factors = 2 * (rows * wide + 2 * low + 2 * rows * len(outs) * RANK)
    work: dict[str, tuple[Callable[[_Operands], Any], float, float]] = {
        "frozen y": (_Operands.frozen, product, 2 * (rows * inner + weights + rows * wide)),
        "y": (_Operands.y, product + pair, forward),
        "frozen dx": (_Operands.frozen_dx, product, 2 * (rows * inner + weights + rows * wide)),
        "dx": (_Operands.dx, product + 2 * rows * RANK * len(outs) * inner, backward),
        "dS dB": (_Operands.factor_gradients, 2 * pair, factors),
        "dS dB, two products": (_Operands.two_products, 2 * pair, factors),
    }
    for what, (run, flops, moved) in work.items():
        found = measure([partial(run, each) for each in given], section.dry)
        section.row(
            what=what, map=name, rows=rows, inner=inner, outs=list(outs), rank=RANK, flops=flops, bytes=moved, **found,
            **floor.share(found, flops, moved),
        )  # fmt: skip


class _Operands:
    def __init__(self, make: Callable[..., Tensor], rows: int, inner: int, outs: Sequence[int]):
        self.x = make(rows, inner)
        self.Ws, self.Bs = [make(out, inner) for out in outs], [make(out, RANK) for out in outs]
        self.S = make(rows, RANK * len(outs))
        self.Ss = list(self.S.split(RANK, 1))
        self.dys, self.A = [make(rows, out) for out in outs], make(RANK * len(outs), inner)

    def frozen(self) -> Any:
        return [self.x @ W.t() for W in self.Ws]

    def y(self) -> Any:
        if len(self.Ws) == 1:
            return OPS.sum_of_products([self.x, self.S], [self.Ws[0].t(), self.Bs[0].t()], None)
        nothing = [None] * len(self.Ws)
        return OPS.group_products(self.x, self.Ws, nothing, self.Ss, self.Bs, nothing)

    def frozen_dx(self) -> Any:
        return OPS.sum_of_products(self.dys, self.Ws, None)

    def dx(self) -> Any:
        return OPS.sum_of_products([*self.dys, self.S], [*self.Ws, self.A], None)

    def factor_gradients(self) -> Any:
        if len(self.Ws) == 1:
            return OPS.factor_gradients(self.dys[0], self.Bs[0], self.S)
        return OPS.group_gradients(self.dys, self.Bs, self.Ss, [None] * len(self.dys))

    def two_products(self) -> Any:
        return [(dy @ B, dy.t() @ S) for dy, B, S in zip(self.dys, self.Bs, self.Ss, strict=True)]


if __name__ == "__main__":
    main()
