"""quantize-nf4: W ≈ c[q]·m, four bits an element and one maximum a block (arXiv 2305.14314)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lrcompile.errors import SpecError
from lrcompile.passes.base import Equivalence, Pass, Program, Result
from lrcompile.program_nf4 import nf4_sites, quantize_program
from lrcompile.recipes.qlora import BLOCK_SIZES


@dataclass(frozen=True)
class QuantizeNf4(Pass):
    """W ≈ c[q]·m for the linear maps of the model but heads, routers and shared weights.

    The error of a Gaussian weight is 9.2 % of its norm; what of it reaches an output depends on the model, so the
    tolerance is wide and the measured number is what counts.
    """

    name: ClassVar[str] = "quantize-nf4"
    preserves: ClassVar[Equivalence] = "approximate"
    tolerance: ClassVar[float] = 0.5
    block_size: int = 64

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            raise SpecError(
                f"block_size={self.block_size} is not valid: choose one of {BLOCK_SIZES}", field="block_size"
            )

    def apply(self, program: Program) -> Result:
        before = set(nf4_sites(program.exported))
        program.recipes = quantize_program(program.exported, program.model, program.recipes, self.block_size)
        return Result(len(set(nf4_sites(program.exported)) - before))
