"""expand-lora: the dialect's `lora` as the plain operations that define it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from lrcompile.passes.base import Equivalence, Pass, Program, Result
from lrcompile.passes.nodes import LORA, call, tidy
from lrcompile.passes.tensors import Tensors, substitute

aten = torch.ops.aten


@dataclass(frozen=True)
class ExpandLora(Pass[Program]):
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
                code = call(graph, aten.linear.default, x, A)
                if value is None or float(value) != 1.0:
                    cast = scale if _dtype(scale) == _dtype(y) else call(graph, aten.to.dtype, scale, _dtype(y))
                    code = call(graph, aten.mul.Tensor, code, cast)
                result = call(graph, aten.add.Tensor, y, call(graph, aten.linear.default, code, B))
            result.meta = {**node.meta}
            substitute(program.exported, node, result)
            count += 1
        if count:
            tidy(program.exported)
        return Result(count)


def _dtype(node: fx.Node) -> torch.dtype:
    return node.meta["val"].dtype
