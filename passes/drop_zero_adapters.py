"""drop-zero-adapters: y + s·(xAᵀ)0ᵀ = y."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lrcompile.passes.base import Equivalence, Pass, Program, Result
from lrcompile.passes.nodes import ADAPTERS, tidy
from lrcompile.passes.tensors import Tensors, substitute


@dataclass(frozen=True)
class DropZeroAdapters(Pass[Program]):
    """y + s·(xAᵀ)0ᵀ = y + s·(x0ᵀ)Bᵀ = y: an adapter that was never trained costs nothing.

    Takes adapters of which one factor is zero in every element. Outputs are equal, where −0 equals 0.
    """

    name: ClassVar[str] = "drop-zero-adapters"
    preserves: ClassVar[Equivalence] = "exact"

    def apply(self, program: Program) -> Result:
        graph, tensors, count = program.exported.graph, Tensors(program.exported), 0
        for node in list(graph.nodes):
            if node.target not in ADAPTERS:
                continue
            A, B = (tensors.value(factor) for factor in node.args[2:4])
            if (B is not None and not B.any()) or (A is not None and not A.any()):  # A, where an embedding starts
                substitute(program.exported, node, node.args[0])
                count += 1
        if count:
            tidy(program.exported)
        return Result(count)
