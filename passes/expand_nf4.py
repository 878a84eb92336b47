"""expand-nf4: `nf4_linear` as plain operations on its codes, for a runtime that has no operator for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx

from lrcompile.dialect.nf4 import nf4_linear_aten
from lrcompile.kernels.nf4_dequant import tables
from lrcompile.passes.base import Equivalence, Pass, Program, Result
from lrcompile.passes.nodes import NF4_LINEAR, tidy
from lrcompile.passes.tensors import Tensors, substitute


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
            _inline(program.exported, node, [*node.args, *constants])
        tidy(program.exported)
        return Result(len(nodes))


def _inline(program: ExportedProgram, node: fx.Node, args: list[Any]) -> None:
    """Put the operations of the plain form, traced on this node's own shapes, in its place."""
    given = [arg for arg in args if isinstance(arg, fx.Node)]

    def plain(*values: torch.Tensor) -> torch.Tensor:
        left = iter(values)
        filled: list[Any] = [next(left) if isinstance(arg, fx.Node) else arg for arg in args]
        return nf4_linear_aten(*filled)

    mode = node.meta["val"].fake_mode
    with mode:
        body = make_fx(plain)(*(arg.meta["val"] for arg in given))
    mapped: dict[fx.Node, Any] = dict(zip(body.graph.find_nodes(op="placeholder"), given, strict=True))
    with node.graph.inserting_before(node):
        for each in body.graph.nodes:
            if each.op == "call_function":
                mapped[each] = node.graph.node_copy(each, lambda n: mapped[n])
    (result,) = body.graph.output_node().args
    substitute(program, node, mapped[result])  # type: ignore[index]
