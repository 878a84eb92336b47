"""expand-gains: the dialect's `gain` as the plain operations that define it, g − 1 held."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from lrcompile.passes.base import Equivalence, Pass, Program, Result
from lrcompile.passes.nodes import GAIN, call, tidy
from lrcompile.passes.tensors import Tensors, substitute

aten = torch.ops.aten


@dataclass(frozen=True)
class ExpandGains(Pass[Program]):
    """gain(y, g, c) = y + h ⊙ (y − c) in aten, h = g − 1 held in y's dtype.

    The op itself may round in another order: on a CPU it is one kernel. Leaves gains that are not held (fold-gains
    holds them) to the op's own decomposition, which every lowering applies.
    """

    name: ClassVar[str] = "expand-gains"
    preserves: ClassVar[Equivalence] = "reassociation"

    def apply(self, program: Program) -> Result:
        graph, tensors, count = program.exported.graph, Tensors(program.exported), 0
        made: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
        first = next(node for node in graph.nodes if node.op == "placeholder")
        for node in [node for node in graph.nodes if node.target is GAIN]:
            y, g, kept = (*node.args, None)[:3]
            target, dtype = tensors.target(g), y.meta["val"].dtype
            if target is None:
                continue
            if (g, dtype) not in made:
                made[g, dtype] = tensors.add(f"{target}_less_one", (tensors.get(g) - 1).to(dtype), first)
            with graph.inserting_before(node):
                moved = y if kept is None else call(graph, aten.sub.Tensor, y, _cast(kept, dtype))
                more = call(graph, aten.mul.Tensor, made[g, dtype], moved)
                result = call(graph, aten.add.Tensor, y, more)
            result.meta = {**node.meta}
            substitute(program.exported, node, result)
            count += 1
        if count:
            tidy(program.exported)
        return Result(count)


def _cast(node: fx.Node, dtype: torch.dtype) -> fx.Node:
    return node if node.meta["val"].dtype == dtype else call(node.graph, aten.to.dtype, node, dtype)
