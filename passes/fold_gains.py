"""fold-gains: g(tensors) = the values it has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from lrcompile.passes.base import Equivalence, Pass, Program, Result
from lrcompile.passes.nodes import GAINS, adapter_target, tidy
from lrcompile.passes.tensors import Tensors


@dataclass(frozen=True)
class FoldGains(Pass[Program]):
    """gain(y, f(tensors), c) = gain(y, g, c) with g = f(tensors) held: no norm of a weight is left in the program.

    One tensor for each adapter and value, so that the calls of one layer share theirs.
    """

    name: ClassVar[str] = "fold-gains"
    preserves: ClassVar[Equivalence] = "exact"

    def apply(self, program: Program) -> Result:
        graph, tensors, count = program.exported.graph, Tensors(program.exported), 0
        made: dict[str, list[tuple[Tensor, fx.Node]]] = {}
        first = next(node for node in graph.nodes if node.op == "placeholder")
        for node in [node for node in graph.nodes if node.target in GAINS]:
            if tensors.view(node.args[1]) is not None:
                continue
            value = tensors.value(node.args[1])
            if value is None:
                continue
            prefix = (adapter_target(node.args[1], tensors) or node.name).rpartition(".")[0]
            same = [held for known, held in made.setdefault(prefix, []) if torch.equal(known, value)]
            if not same:
                same = [tensors.add(f"{prefix}.g".lstrip("."), value.contiguous(), first)]
                made[prefix].append((value, same[0]))
            node.update_arg(1, same[0])
            count += 1
        if count:
            tidy(program.exported)
        return Result(count)
