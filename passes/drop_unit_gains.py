"""drop-unit-gains: y + (1 − 1) ⊙ (y − c) = y."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lrcompile.passes.base import Equivalence, Pass, Program, Result
from lrcompile.passes.folding import NotFoldable
from lrcompile.passes.input_gains import gained
from lrcompile.passes.nodes import GAIN, INPUT_GAIN, tidy
from lrcompile.passes.tensors import Tensors, substitute


@dataclass(frozen=True)
class DropUnitGains(Pass[Program]):
    """gain(y, 1, c) = y, and xWᵀ + (x ⊙ (1 − 1))Wᵀ = xWᵀ: gains that were never trained cost nothing.

    Outputs are equal, where −0 equals 0.
    """

    name: ClassVar[str] = "drop-unit-gains"
    preserves: ClassVar[Equivalence] = "exact"

    def apply(self, program: Program) -> Result:
        tensors, count = Tensors(program.exported), 0
        for node in list(program.exported.graph.nodes):
            if node.target not in (GAIN, INPUT_GAIN):
                continue
            g = tensors.value(node.args[1])
            if g is None or not bool((g == 1).all()):
                continue
            if node.target is INPUT_GAIN:
                try:
                    node = gained(node).sum
                except NotFoldable:
                    continue
            substitute(program.exported, node, node.args[0])
            count += 1
        if count:
            tidy(program.exported)
        return Result(count)
