"""prune-ranks: Σₖ Bₖ·Aₖ without the terms that are zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx

from lrcompile.passes.base import Equivalence, Pass, Program, Result
from lrcompile.passes.nodes import ADAPTERS, EXPERTS, tidy
from lrcompile.passes.tensors import Tensors


@dataclass(frozen=True)
class PruneRanks(Pass[Program]):
    """Σₖ (x·aₖ)bₖᵀ = the sum over k with aₖ ≠ 0 ≠ bₖ: rows of A and columns of B that add nothing go.

    What AdaLoRA masked, and what never trained, costs nothing. A factor that other adapters read too (q, k and v take
    slices of one B) keeps the k that any of them needs. Leaves at least one k; an adapter that is zero as a whole is
    for drop-zero-adapters.
    """

    name: ClassVar[str] = "prune-ranks"
    preserves: ClassVar[Equivalence] = "reassociation"

    def apply(self, program: Program) -> Result:
        tensors = Tensors(program.exported)
        first = next(node for node in program.exported.graph.nodes if node.op == "placeholder")
        count = 0
        for nodes in _sharing(program, tensors):
            A, B = (tensors.view(nodes[0].args[index]) for index in (2, 3))
            assert A is not None
            assert B is not None
            if A.steps or any(tensors.view(node.args[3]).steps and node.target is EXPERTS for node in nodes):  # type: ignore[union-attr]
                continue
            held_A, held_B = tensors.get(A.source), tensors.get(B.source)
            kept = _needed(held_A, held_B)
            if kept.numel() == held_A.shape[-2]:
                continue
            names = [tensors.targets[source.name] for source in (A.source, B.source)]
            new_A = tensors.add(f"{names[0]}_pruned", held_A.index_select(-2, kept), first)
            new_B = tensors.add(f"{names[1]}_pruned", held_B.index_select(-1, kept), first)
            for node in nodes:
                view = tensors.view(node.args[3])
                assert view is not None
                with program.exported.graph.inserting_before(node):
                    node.update_arg(2, new_A)
                    node.update_arg(3, view.rebuilt(new_B))
                count += 1
        if count:
            tidy(program.exported)
        return Result(count)


def _sharing(program: Program, tensors: Tensors) -> list[list[fx.Node]]:
    """Adapter nodes by the two held tensors their factors come from; pairs of which one is computed are left out."""
    groups: dict[tuple[fx.Node, fx.Node], list[fx.Node]] = {}
    for node in program.exported.graph.nodes:
        if node.target in ADAPTERS:
            A, B = (tensors.view(node.args[index]) for index in (2, 3))
            if A is not None and B is not None:
                groups.setdefault((A.source, B.source), []).append(node)
    return list(groups.values())


def _needed(A: Tensor, B: Tensor) -> Tensor:
    """The indices k for which neither row of A nor column of B is zero, in any map of a stack."""
    rows = A.ne(0).any(-1)
    columns = B.ne(0).any(-2)
    needed = rows & columns
    while needed.dim() > 1:
        needed = needed.any(0)
    kept = needed.nonzero().flatten()
    return kept if kept.numel() else needed.new_zeros(1).long()
