"""merge-lora: xWᵀ + s·(xAᵀ)Bᵀ = x(W + s·BA)ᵀ, one weight at a time and only when that weight is written.

    W' = round(W + Σ s·B·A)        accumulated in float32 (float64 for a float64 W), rounded once to W's dtype

The graph loses its adapter nodes at once; the sums are pending, so that a writer holds one folded weight at most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from lrcompile.passes.base import Equivalence, Pass, Program, Result, Update
from lrcompile.passes.folding import (
    Fold,
    NotFoldable,
    Part,
    fold_all,
    held_values,
    product_below,
    require_same_input,
)
from lrcompile.passes.nodes import EXPERTS, LOOKUP, LORA
from lrcompile.passes.routed import product_of_experts
from lrcompile.passes.tensors import Tensors


@dataclass(frozen=True)
class MergeLora(Pass[Program]):
    """xWᵀ + s·(xAᵀ)Bᵀ = x(W + s·BA)ᵀ: one product instead of three, at a rounding of W to its dtype.

    Takes every adapter whose base is a product with, or lookup in, one weight; in a mixture W, A and B are stacks, and
    the product is that of each row with its expert's. Refuses where folding would change what
    the model computes: a base output used elsewhere too, a computed weight, another input. A weight that has other
    uses, not adapted or adapted differently, gets its own copy.
    """

    name: ClassVar[str] = "merge-lora"
    preserves: ClassVar[Equivalence] = "cast"

    def apply(self, program: Program) -> Result:
        return fold_all(program, _match)


@dataclass(frozen=True)
class Pair(Update):
    """s·B·A is added to the view."""

    A: Tensor
    B: Tensor
    scale: Tensor
    transposed: bool
    """The view is [in, out]."""

    def act(self, part: Tensor, base: Tensor) -> None:
        delta = product(self.A, self.B, self.scale, part.dtype)
        part.add_(delta.mT if self.transposed else delta)


def product(A: Tensor, B: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """s·B·A in `dtype`."""
    return (B.to(dtype) @ A.to(dtype)).mul_(scale.to(dtype))


def _match(node: fx.Node, tensors: Tensors, program: Program) -> Fold | None:
    if node.target not in (LORA, LOOKUP, EXPERTS):
        return None
    y, x, *factors = node.args[:5]
    dropout = {LORA: 5, EXPERTS: 6}.get(node.target, len(node.args))
    if len(node.args) > dropout and node.args[dropout]:
        raise NotFoldable("its dropout is active")
    if node.target is EXPERTS:
        base = product_of_experts(y, node.args[5], tensors)
    else:
        base = product_below(y, tensors, lookup=node.target is LOOKUP)
    require_same_input(base, x)
    A, B, scale = held_values(tensors, factors)
    expected = torch.Size((*B.shape[:-1], A.shape[-1]))
    require_shape(base.weight, expected, base.transposed)
    update = Pair(base.view, A, B, scale, base.transposed)
    return Fold(node, base.node, (Part(base.weight, update),), (node.target, *factors))


def require_shape(weight: fx.Node, expected: torch.Size, transposed: bool) -> None:
    """`expected` is that of an update `[..., out, in]`."""
    shape = weight.meta["val"].shape
    if shape != (torch.Size((*expected[:-2], expected[-1], expected[-2])) if transposed else expected):
        raise NotFoldable(f"its update is {tuple(expected)}, the weight it acts beside is {tuple(shape)}")
