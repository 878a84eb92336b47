"""drop-zero-adapters: y + s·(xAᵀ)0ᵀ = y."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lrcompile.passes.base import Equivalence, Pass, Program, Result
from lrcompile.passes.nodes import ADAPTERS, tidy
from lrcompile.passes.tensors import Tensors, substitute


@dataclass(frozen=True)
class DropZeroAdapters(Pass):
    """y + s·(xAᵀ)0ᵀ = y: an adapter that was never trained costs nothing and leaves the base's values (−0 = 0)."""

    name: ClassVar[str] = "drop-zero-adapters"
    preserves: ClassVar[Equivalence] = "exact"

    def apply(self, program: Program) -> Result:
        graph, tensors, count = program.exported.graph, Tensors(program.exported), 0
        for node in list(graph.nodes):
            if node.target not in ADAPTERS:
                continue
            B = tensors.value(node.args[3])
            if B is not None and not B.any():
                substitute(program.exported, node, node.args[0])
                count += 1
        if count:
            tidy(program.exported)
        return Result(count)
