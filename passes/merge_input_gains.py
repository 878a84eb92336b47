"""merge-input-gains: xWᵀ + (x ⊙ (g − 1))Wᵀ = x(W ⊙ g)ᵀ, column by column."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx

from lrcompile.passes.base import Equivalence, Pass, Program, Result, Update
from lrcompile.passes.folding import Fold, NotFoldable, Part, fold_all, held_values, place, product_below
from lrcompile.passes.input_gains import gained
from lrcompile.passes.nodes import INPUT_GAIN
from lrcompile.passes.tensors import Tensors


@dataclass(frozen=True)
class MergeInputGains(Pass[Program]):
    """xWᵀ + (x ⊙ (g − 1))Wᵀ = x(W ⊙ g)ᵀ: one product instead of two, at a rounding of W to its dtype.

    Refuses where the two products have not the same weight and input, or something else reads one of them.
    """

    name: ClassVar[str] = "merge-input-gains"
    preserves: ClassVar[Equivalence] = "cast"

    def apply(self, program: Program) -> Result:
        return fold_all(program, _match)


@dataclass(frozen=True)
class Columns(Update):
    """(g − 1) times each column of the base is added; it is a row of a view stored as [in, out] (`transposed`)."""

    g: Tensor
    transposed: bool

    def act(self, part: Tensor, base: Tensor) -> None:
        less = (self.g - 1).to(part.dtype)
        part.addcmul_(base.to(part.dtype), less.unsqueeze(-1) if self.transposed else less)


def _match(node: fx.Node, tensors: Tensors, program: Program) -> Fold | None:
    if node.target is not INPUT_GAIN:
        return None
    found = gained(node)
    product = product_below(found.sum.args[0], tensors)
    more = product_below(found.sum.args[1], tensors)
    one, other = (place(each.view, each.transposed, tensors) for each in (product, more))
    if one != other or more.bias is not None:
        raise NotFoldable("its two products have not the same weight")
    g = node.args[1]
    (gains,) = held_values(tensors, [g], "gains")
    part = Part(product.weight, Columns(product.view, gains, product.transposed))
    return Fold(found.sum, product.node, (part,), (INPUT_GAIN, g), gone=(found.more,))
