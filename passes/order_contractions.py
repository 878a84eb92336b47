"""order-contractions: (x·Wᵀ) + (x·Aᵀ)(sB)ᵀ = x·(W + sBA)ᵀ, in whichever order takes the least time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from lrcompile.lowered.bases import Dense
from lrcompile.lowered.contractions import MACHINES, Order, Shapes, cheapest
from lrcompile.lowered.group import AdaptedGroup
from lrcompile.lowered.operands import Operands
from lrcompile.passes.base import Equivalence, Pass, Result, Stage
from lrcompile.passes.captured import value


@dataclass(frozen=True)
class OrderContractions(Pass[fx.GraphModule]):
    """(x·Wᵀ) + (x·Aᵀ)(sB)ᵀ = x·(W + sBA)ᵀ: each map of a group gets the order of products that takes the least time.

    By the model in `lowered.contractions`, with the shapes at hand; a symbolic number of rows counts as what it was at
    capture, without a guard on it, since every order is right for any number. Chooses for dense weights with a pair and
    without dropout, in float32 and float64, on devices whose rates are known; others keep the order that activations
    go through the factors.
    """

    name: ClassVar[str] = "order-contractions"
    stage: ClassVar[Stage] = "dynamo"
    preserves: ClassVar[Equivalence] = "reassociation"

    def apply(self, subject: fx.GraphModule) -> Result:
        count = 0
        for node in subject.graph.nodes:
            if isinstance(node.target, AdaptedGroup):
                chosen = _chosen(node.target, node)
                count += chosen != node.target
                node.target = chosen
        if count:
            subject.recompile()
        return Result(count)


def _chosen(group: AdaptedGroup, node: fx.Node) -> AdaptedGroup:
    x, *flat = node.args
    operands = group.split(flat)
    members = tuple(
        replace(member, order=_order(group, index, value(x), value(node)[index], operands))
        for index, member in enumerate(group.members)
    )
    return replace(group, members=members)


def _order(group: AdaptedGroup, index: int, x: Tensor, y: Tensor, operands: Operands) -> Order:
    member = group.members[index]
    alone = len(group.readers(member.code)) == 1 and not group.drops[member.code]
    machine = MACHINES.get((x.device.type, y.dtype))
    if member.role != "pair" or not isinstance(member.base, Dense) or not alone or machine is None:
        return Order()
    A, B, (W,) = value(operands.As[member.code]), value(operands.Bs[index]), operands.held[index]
    *rows, inside, out, rank = (_hint(size) for size in (*x.shape, y.shape[-1], A.shape[0]))
    if {x.dtype, value(W).dtype, A.dtype, B.dtype} != {y.dtype} or None in (*rows, inside, out, rank):
        return Order()
    shapes = Shapes(prod(rows), inside, out, rank, x.requires_grad, A.requires_grad, B.requires_grad)  # type: ignore[arg-type]
    return cheapest(shapes, machine, y.dtype)


def _hint(size: Any) -> int | None:
    """What a size was at capture; None where it depends on data."""
    return size if isinstance(size, int) else size.node.hint if isinstance(size, torch.SymInt) else None
