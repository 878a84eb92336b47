"""expand-nf4: `nf4_linear` as plain operations on its codes, for a runtime that has no operator for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lrcompile.dialect.nf4 import nf4_linear_aten
from lrcompile.kernels.nf4_dequant import tables
from lrcompile.passes.base import Equivalence, Pass, Program, Result
from lrcompile.passes.inlining import inline
from lrcompile.passes.nodes import NF4_LINEAR, tidy
from lrcompile.passes.tensors import Tensors


@dataclass(frozen=True)
class ExpandNf4(Pass[Program]):
    """nf4_linear(x, q, m) = x·(c[q]·m)ᵀ + b in aten: a gather, a product by block maxima, a linear map.

    The two code tables become buffers of the program, once.
    """

    name: ClassVar[str] = "expand-nf4"
    preserves: ClassVar[Equivalence] = "reassociation"

    def apply(self, program: Program) -> Result:
        graph = program.exported.graph
        nodes = [node for node in graph.nodes if node.target is NF4_LINEAR]
        if not nodes:
            return Result(0)
        tensors = Tensors(program.exported)
        first = next(node for node in graph.nodes if node.op == "placeholder")
        constants = [
            tensors.add(f"nf4_{name}", table, first)
            for name, table in tables(nodes[0].args[1].meta["val"].device)._asdict().items()
        ]
        for node in nodes:
            inline(program.exported, node, [*node.args, *constants], nf4_linear_aten)
        tidy(program.exported)
        return Result(len(nodes))
