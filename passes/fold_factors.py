"""fold-factors: A'(tensors), B'(tensors) = the values they have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from lrcompile.passes.base import Equivalence, Pass, Program, Result
from lrcompile.passes.nodes import ADAPTERS, adapter_target, tidy
from lrcompile.passes.tensors import Tensors


@dataclass(frozen=True)
class FoldFactors(Pass[Program]):
    """lora(y, x, f(tensors), g(tensors), s) = lora(y, x, A', B', s) with A' = f(tensors) and B' = g(tensors) held.

    The factors a form computes at each call (λ_b ⊙ B·diag(λ_d), A ⊙ E, [A; A₀], …) become tensors of the program,
    evaluated by the very operations they replace; then the other passes see plain pairs. Leaves factors that are held
    already, or read as a view of what is.
    """

    name: ClassVar[str] = "fold-factors"
    preserves: ClassVar[Equivalence] = "exact"

    def apply(self, program: Program) -> Result:
        graph, tensors, count = program.exported.graph, Tensors(program.exported), 0
        made: dict[fx.Node, fx.Node] = {}
        first = next(node for node in graph.nodes if node.op == "placeholder")
        for node in [node for node in graph.nodes if node.target in ADAPTERS]:
            for index, letter in ((2, "A"), (3, "B")):
                factor = node.args[index]
                if tensors.view(factor) is not None:
                    continue
                if factor not in made:
                    value = tensors.value(factor)
                    if value is None:
                        continue
                    prefix = (adapter_target(factor, tensors) or node.name).rpartition(".")[0]
                    made[factor] = tensors.add(f"{prefix}.{letter}_folded".lstrip("."), value.contiguous(), first)
                node.update_arg(index, made[factor])
                count += 1
        if count:
            tidy(program.exported)
        return Result(count)
