"""drop-zero-adapters: y + s·(xAᵀ)0ᵀ = y."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lrcompile.folding import LOOKUP, LORA
from lrcompile.passes.base import Equivalence, Pass, Program, Result
from lrcompile.programs import Tensors


@dataclass(frozen=True)
class DropZeroAdapters(Pass):
    """y + s·(xAᵀ)0ᵀ = y: an adapter that was never trained costs nothing and leaves the base's bits."""

    name: ClassVar[str] = "drop-zero-adapters"
    preserves: ClassVar[Equivalence] = "exact"

    def apply(self, program: Program) -> Result:
        graph, tensors, count = program.exported.graph, Tensors(program.exported), 0
        for node in list(graph.nodes):
            if node.target not in (LORA, LOOKUP):
                continue
            B = tensors.value(node.args[3])
            if B is not None and not B.any():
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
                count += 1
        if count:
            graph.eliminate_dead_code()
            program.exported.graph_module.recompile()
        return Result(count)
