"""fuse-input-gains: xWᵀ + (x ⊙ (g − 1))Wᵀ = (x ⊙ g)Wᵀ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from lrcompile.passes.base import Equivalence, Pass, Program, Refusal, Result
from lrcompile.passes.folding import NotFoldable, place, product_below
from lrcompile.passes.input_gains import gained
from lrcompile.passes.nodes import INPUT_GAIN, NF4_LINEAR, call, site_of, tidy
from lrcompile.passes.tensors import Tensors, substitute

aten = torch.ops.aten


@dataclass(frozen=True)
class FuseInputGains(Pass[Program]):
    """xWᵀ + (x ⊙ (g − 1))Wᵀ = (x ⊙ g)Wᵀ: one product instead of two, for weights that are float or NF4 codes.

    Refuses in 16-bit dtypes, where a gain near one would round to one, and where the two products differ in more than
    their input and bias.
    """

    name: ClassVar[str] = "fuse-input-gains"
    preserves: ClassVar[Equivalence] = "reassociation"

    def apply(self, program: Program) -> Result:
        graph, tensors = program.exported.graph, Tensors(program.exported)
        count, refusals = 0, []
        for node in [node for node in graph.nodes if node.target is INPUT_GAIN]:
            try:
                found = gained(node)
                _require_same_map(found.base, found.more, tensors)
                _require_digits(node.meta["val"])
            except NotFoldable as reason:
                refusals.append(Refusal(site_of(node, tensors), str(reason)))
                continue
            with graph.inserting_before(found.base):
                g, dtype = node.args[1], found.given.meta["val"].dtype
                g = g if g.meta["val"].dtype == dtype else call(graph, aten.to.dtype, g, dtype)
                found.base.replace_input_with(found.given, call(graph, aten.mul.Tensor, found.given, g))
            substitute(program.exported, found.sum, found.sum.args[0])  # type: ignore[arg-type]
            count += 1
        if count:
            tidy(program.exported)
        return Result(count, tuple(refusals))


def _require_same_map(base: fx.Node, more: fx.Node, tensors: Tensors) -> None:
    if base.target is NF4_LINEAR and more.target is NF4_LINEAR:
        same = base.args[1:5] == more.args[1:5] and base.args[6:] == more.args[6:] and more.args[5] is None
    else:
        one, other = (product_below(each, tensors) for each in (base, more))
        first, second = (place(each.view, each.transposed, tensors) for each in (one, other))
        same = first == second and other.bias is None
    if not same:
        raise NotFoldable("its two products have not the same weight")


def _require_digits(x: Tensor) -> None:
    if x.dtype.itemsize < 4:
        raise NotFoldable(f"a gain near one would round to one in {x.dtype}")
