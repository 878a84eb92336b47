"""integer-inputs: x·Wᵀ ≈ round(x)·Wᵀ where W is integers, so that a runtime may multiply integers by integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lrcompile.passes.base import Equivalence, Pass, Program, Result
from lrcompile.passes.nodes import INTEGER_LINEAR
from lrcompile.passes.tensors import Tensors


@dataclass(frozen=True)
class IntegerInputs(Pass[Program]):
    """integer_linear(x, q, s) ≈ integer_linear(x̂, q, s): each block of x rounded to 8 bits by its largest element.

    Errors are of x̂, in steps of max|x|/127 of a block: a half, whatever x is.
    """

    name: ClassVar[str] = "integer-inputs"
    preserves: ClassVar[Equivalence] = "approximate"
    tolerance: ClassVar[float] = 0.5

    def apply(self, program: Program) -> Result:
        tensors, errors = Tensors(program.exported), {}
        for node in program.exported.graph.nodes:
            if node.target is INTEGER_LINEAR and not node.args[7]:
                node.update_arg(7, True)
                errors[f"input of {tensors.targets[node.args[1].name]} at {node.name}"] = self.tolerance
        if errors:
            program.exported.graph_module.recompile()
        return Result(len(errors), errors=errors)
