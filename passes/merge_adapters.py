"""merge-adapters: every kind of adapter folded into its weight, from the product outwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lrcompile.passes.base import Equivalence, Pass, Program, Result
from lrcompile.passes.merge_gains import MergeGains
from lrcompile.passes.merge_hadamard import MergeHadamard
from lrcompile.passes.merge_input_gains import MergeInputGains
from lrcompile.passes.merge_lora import MergeLora

MERGES: tuple[Pass, ...] = (MergeInputGains(), MergeHadamard(), MergeLora(), MergeGains())


@dataclass(frozen=True)
class MergeAdapters(Pass[Program]):
    """f(xWᵀ) = xW'ᵀ for f a stack of adapters: the merge passes in turn, until none of them finds anything more.

    A stack may mix kinds (a pair below a gain below a pair); each pass folds what sits on a product by then.
    """

    name: ClassVar[str] = "merge-adapters"
    preserves: ClassVar[Equivalence] = "cast"

    def apply(self, program: Program) -> Result:
        total = 0
        while True:
            results = [each.apply(program) for each in MERGES]
            count = sum(result.count for result in results)
            if not count:
                return Result(total, tuple(refusal for result in results for refusal in result.refusals))
            total += count
