"""order-contractions: (x·Wᵀ) + (x·Aᵀ)(sB)ᵀ = x·(W + sBA)ᵀ, in whichever order takes the least time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from lrcompile.kernels.nf4_linear.cost import best_path
from lrcompile.lowered.bases import Quantized
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
    go through the factors. An NF4 base with few rows is multiplied by its codes, where a kernel for that is predicted
    to be faster (`kernels.nf4_linear.cost`).
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
    operands, rows = group.split(flat), [_hint(size) for size in value(x).shape[:-1]]
    if None in rows:
        return group
    count = prod(rows)  # type: ignore[arg-type]
    members = []
    for index, member in enumerate(group.members):
        if isinstance(member.base, Quantized):
            by_codes = products_by_codes(member.base, count, value(x).device)
            members.append(replace(member, base=replace(member.base, by_codes=by_codes)))
        else:
            order = _order(group, index, count, value(x), value(node)[index], operands)
            members.append(replace(member, order=order))
    return replace(group, members=tuple(members))


def products_by_codes(base: Quantized, rows: int, device: torch.device) -> bool:
    """Is one kernel on the codes predicted to be faster than dequantizing? Only GPUs have such kernels."""
    sizes = (base.out_features, base.in_features, base.compute_dtype, base.block_size, base.transposed)
    return device.type == "cuda" and best_path(rows, *sizes) != "dequantize"


def _order(group: AdaptedGroup, index: int, rows: int, x: Tensor, y: Tensor, operands: Operands) -> Order:
    member = group.members[index]
    alone = len(group.readers(member.code)) == 1 and not group.drops[member.code]
    machine = MACHINES.get((x.device.type, y.dtype))
    if member.role != "pair" or not alone or machine is None:
        return Order()
    A, B = _factor(operands, member.code), _factor(operands, group.codes + index)
    (W,) = operands.held[index]
    inside, out, rank = (_hint(size) for size in (x.shape[-1], y.shape[-1], A[0].shape[0]))
    dtypes = {each.dtype for each in (x, value(W), *A, *B)}
    if dtypes != {y.dtype} or inside is None or out is None or rank is None:
        return Order()
    wants = [any(each.requires_grad for each in factor) for factor in (A, B)]
    shapes = Shapes(rows, inside, out, rank, x.requires_grad, *wants)
    return cheapest(shapes, machine, y.dtype)


def _factor(operands: Operands, index: int) -> list[Tensor]:
    """The values of a factor and of the diagonals that it is between."""
    each = (operands.factors[index], operands.rows[index], operands.columns[index])
    return [value(one) for one in each if one is not None]


def _hint(size: Any) -> int | None:
    """What a size was at capture; None where it depends on data."""
    return size if isinstance(size, int) else size.node.hint if isinstance(size, torch.SymInt) else None
