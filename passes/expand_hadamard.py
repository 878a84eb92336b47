"""expand-hadamard: y + s·x(W ⊙ BA)ᵀ as one product more, its matrix held."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from lrcompile.passes.base import Equivalence, Pass, Program, Result
from lrcompile.passes.nodes import HADAMARD, adapter_target, call, tidy
from lrcompile.passes.tensors import Tensors, substitute

aten = torch.ops.aten


@dataclass(frozen=True)
class ExpandHadamard(Pass[Program]):
    """y + s·x(W ⊙ BA)ᵀ = y + xDᵀ with D = s·W ⊙ BA held, as large as W: there is no cheaper form beside W.

    D is formed as the op forms it, in y's dtype. Leaves active dropout and what depends on an input to the op's own
    decomposition, which every lowering applies.
    """

    name: ClassVar[str] = "expand-hadamard"
    preserves: ClassVar[Equivalence] = "exact"

    def apply(self, program: Program) -> Result:
        graph, tensors, count = program.exported.graph, Tensors(program.exported), 0
        made: dict[tuple[object, ...], fx.Node] = {}
        first = next(node for node in graph.nodes if node.op == "placeholder")
        for node in [node for node in graph.nodes if node.target is HADAMARD]:
            y, x, *operands = node.args[:6]
            values = [tensors.value(each) for each in operands]
            if any(value is None for value in values) or (len(node.args) > 6 and node.args[6]):
                continue
            dtype = y.meta["val"].dtype
            key = (*operands, dtype)
            if key not in made:
                A, B, scale, W = (value.to(dtype) for value in values)  # type: ignore[union-attr]
                prefix = (adapter_target(operands[0], tensors) or node.name).rpartition(".")[0]
                made[key] = tensors.add(f"{prefix}.D".lstrip("."), W * (B @ A) * scale, first)
            with graph.inserting_before(node):
                given = x if x.meta["val"].dtype == dtype else call(graph, aten.to.dtype, x, dtype)
                result = call(graph, aten.add.Tensor, y, call(graph, aten.linear.default, given, made[key]))
            result.meta = {**node.meta}
            substitute(program.exported, node, result)
            count += 1
        if count:
            tidy(program.exported)
        return Result(count)
