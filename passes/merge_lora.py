"""merge-lora: xWᵀ + s·(xAᵀ)Bᵀ = x(W + s·BA)ᵀ, formed in float32 and rounded once, when the weight is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lrcompile.errors import SpecError
from lrcompile.folding import fold_adapters
from lrcompile.passes.base import Equivalence, Pass, Program, Refusal, Result
from lrcompile.program_nf4 import spell_out_adapted

_INTO = ("keep", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class MergeLora(Pass):
    """xWᵀ + s·(xAᵀ)Bᵀ = x(W + s·BA)ᵀ: one product instead of three, at a rounding of W's dtype.

    Refuses an adapter whose base output, input or weight is used otherwise. `into` says what an NF4 weight becomes;
    "keep" leaves the pair beside it.
    """

    name: ClassVar[str] = "merge-lora"
    preserves: ClassVar[Equivalence] = "cast"
    into: str = "keep"

    def __post_init__(self) -> None:
        if self.into not in _INTO:
            raise SpecError(
                f"into={self.into!r} is not valid: choose one of {', '.join(map(repr, _INTO))}", field="into"
            )

    def apply(self, program: Program) -> Result:
        if self.into != "keep":
            program.recipes |= spell_out_adapted(program.exported, getattr(torch, self.into))
        folded = fold_adapters(program.exported, program.recipes)
        program.recipes = folded.recipes
        return Result(len(folded.sites), tuple(Refusal(node, reason) for node, reason in folded.kept.items()))
