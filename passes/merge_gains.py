"""merge-gains: c + g ⊙ (xWᵀ + b − c) = x(g ⊙ W)ᵀ + c + g ⊙ (b − c), row by row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, fx

from lrcompile.passes.base import Equivalence, Pass, Program, Result, Update
from lrcompile.passes.folding import Fold, NotFoldable, Part, Product, fold_all, held_values, place, product_below
from lrcompile.passes.nodes import GAIN
from lrcompile.passes.tensors import Tensors, View


@dataclass(frozen=True)
class MergeGains(Pass[Program]):
    """g ⊙ (xWᵀ + b) = x(g ⊙ W)ᵀ + g ⊙ b, and b + g ⊙ xWᵀ = x(g ⊙ W)ᵀ + b where the gain keeps the bias.

    Each changed tensor is rounded to its dtype once, with all that is folded into it. Refuses where the product's
    result is used elsewhere too, its weight or bias is computed, or the gain keeps something else than the bias.
    """

    name: ClassVar[str] = "merge-gains"
    preserves: ClassVar[Equivalence] = "cast"

    def apply(self, program: Program) -> Result:
        return fold_all(program, _match)


@dataclass(frozen=True)
class Rows(Update):
    """Each row of the view, stored as [in, out] if `transposed`, is multiplied by its gain."""

    g: Tensor
    transposed: bool

    def act(self, part: Tensor, base: Tensor) -> None:
        g = self.g.to(part.dtype)
        part.mul_(g if self.transposed else g.unsqueeze(-1))


@dataclass(frozen=True)
class Numbers(Update):
    """Each number of the view is multiplied by its gain; where `kept`, only what updates before this one changed it."""

    g: Tensor
    kept: bool

    def act(self, part: Tensor, base: Tensor) -> None:
        stays = base.to(part.dtype) if self.kept else 0
        part.copy_((part - stays) * self.g.to(part.dtype) + stays)


def _match(node: fx.Node, tensors: Tensors, program: Program) -> Fold | None:
    if node.target is not GAIN:
        return None
    y, g, kept = (*node.args, None)[:3]
    product = product_below(y, tensors)
    (gains,) = held_values(tensors, [g], "gains")
    shape = product.weight.meta["val"].shape
    if gains.shape != shape[-1:] if product.transposed else gains.shape != shape[:1]:
        raise NotFoldable(f"its gains are {tuple(gains.shape)}, the weight it acts beside is {tuple(shape)}")
    parts = [Part(product.weight, Rows(product.view, gains, product.transposed))]
    if (bias := _bias(product, kept, tensors, program)) is not None:
        parts.append(Part(bias[0], Numbers(bias[1], gains, kept is not None)))
    return Fold(node, product.node, tuple(parts), (GAIN, g, kept))


def _bias(product: Product, kept: Any, tensors: Tensors, program: Program) -> tuple[fx.Node, View] | None:
    """The bias that the gain changes, with its view; None if it changes none."""
    held, stays = tensors.view(product.bias), tensors.view(kept)
    if product.bias is not None and held is None:
        raise NotFoldable("its bias is computed, not held")
    if kept is not None and (
        held is None or stays is None or place(held, False, tensors) != place(stays, False, tensors)
    ):
        raise NotFoldable("it keeps something else of its base output than the bias")
    if held is None or product.bias is None:
        return None
    changed = tensors.targets[held.source.name] in program.pending
    return (product.bias, held) if kept is None or changed else None
