"""merge-hadamard: xWᵀ + s·x(W ⊙ BA)ᵀ = x(W + s·W ⊙ BA)ᵀ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from lrcompile.passes.base import Equivalence, Pass, Program, Result, Update
from lrcompile.passes.folding import (
    Fold,
    NotFoldable,
    Part,
    Product,
    fold_all,
    held_values,
    place,
    product_below,
    require_same_input,
)
from lrcompile.passes.merge_lora import product as pair
from lrcompile.passes.merge_lora import require_shape
from lrcompile.passes.nodes import HADAMARD
from lrcompile.passes.tensors import Tensors


@dataclass(frozen=True)
class MergeHadamard(Pass[Program]):
    """xWᵀ + s·x(W ⊙ BA)ᵀ = x(W + s·W ⊙ BA)ᵀ, at a rounding of W to its dtype.

    Refuses where the W that the adapter multiplies is not the weight of the product it adds to.
    """

    name: ClassVar[str] = "merge-hadamard"
    preserves: ClassVar[Equivalence] = "cast"

    def apply(self, program: Program) -> Result:
        return fold_all(program, _match)


@dataclass(frozen=True)
class Multiple(Update):
    """The base times s·B·A, element by element, is added to the view."""

    A: Tensor
    B: Tensor
    scale: Tensor
    transposed: bool
    """The view is [in, out]."""

    def act(self, part: Tensor, base: Tensor) -> None:
        update = pair(self.A, self.B, self.scale, part.dtype)
        part.addcmul_(base.to(part.dtype), update.mT if self.transposed else update)


def _match(node: fx.Node, tensors: Tensors, program: Program) -> Fold | None:
    if node.target is not HADAMARD:
        return None
    y, x, *factors, W = node.args[:6]
    if len(node.args) > 6 and node.args[6]:
        raise NotFoldable("its dropout is active")
    product = product_below(y, tensors)
    require_same_input(product, x)
    A, B, scale = held_values(tensors, factors)
    require_shape(product.weight, torch.Size((B.shape[0], A.shape[1])), product.transposed)
    if not _is_weight(W, product, tensors, program):
        raise NotFoldable("the weight it multiplies is not the one of the product it adds to")
    part = Part(product.weight, Multiple(product.view, A, B, scale, product.transposed))
    return Fold(node, product.node, (part,), (HADAMARD, *factors))


def _is_weight(W: Any, product: Product, tensors: Tensors, program: Program) -> bool:
    """Is W, transposed or computed from the same codes, what the product reads?"""
    view = tensors.view(W)
    if view is not None and place(view, False, tensors) == place(product.view, product.transposed, tensors):
        return True
    pending = program.pending.get(tensors.targets[product.view.source.name])
    value = tensors.value(W)
    base = tensors.get(product.view.source) if pending is None else pending.base()
    base = product.view.of(base)
    return value is not None and torch.equal(value, (base.mT if product.transposed else base).to(value.dtype))
