"""expand-lora: the dialect's `lora` as the plain operations that define it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from lrcompile.passes.base import Equivalence, Pass, Program, Result
from lrcompile.programs import Tensors

aten = torch.ops.aten
LORA = torch.ops.lrcompile.lora.default


@dataclass(frozen=True)
class ExpandLora(Pass):
    """lora(y, x, A, B, s) = y + (s·(xAᵀ))Bᵀ in aten, without the product by a scale of one.

    Leaves active dropout and the lookup form to the op's own decomposition, which every lowering applies.
    """

    name: ClassVar[str] = "expand-lora"
    preserves: ClassVar[Equivalence] = "exact"

    def apply(self, program: Program) -> Result:
        graph, tensors, count = program.exported.graph, Tensors(program.exported), 0
        for node in list(graph.nodes):
            if node.target is not LORA or (len(node.args) > 5 and node.args[5]):
                continue
            y, x, A, B, scale = node.args[:5]
            if A.meta["val"].dim() != 2 or any(_dtype(each) != _dtype(y) for each in (x, A, B)):
                continue
            value = tensors.value(scale)
            with graph.inserting_before(node):
                code = _call(graph, aten.linear.default, x, A)
                if value is None or float(value) != 1.0:
                    cast = scale if _dtype(scale) == _dtype(y) else _call(graph, aten.to.dtype, scale, _dtype(y))
                    code = _call(graph, aten.mul.Tensor, code, cast)
                result = _call(graph, aten.add.Tensor, y, _call(graph, aten.linear.default, code, B))
            result.meta = {**node.meta}
            node.replace_all_uses_with(result)
            graph.erase_node(node)
            count += 1
        if count:
            graph.eliminate_dead_code()
            program.exported.graph_module.recompile()
        return Result(count)


def _dtype(node: fx.Node) -> torch.dtype:
    return node.meta["val"].dtype


def _call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    node = graph.call_function(target, args)
    node.meta = {"val": target(*(each.meta["val"] if isinstance(each, fx.Node) else each for each in args))}
    return node
