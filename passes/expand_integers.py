"""expand-integers: `integer_linear` as plain operations on its codes, for a runtime that has no operator for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from lrcompile.integers.blocks import Integers, dequantize_integers, rounded_inputs
from lrcompile.passes.base import Equivalence, Pass, Program, Result
from lrcompile.passes.inlining import inline
from lrcompile.passes.nodes import INTEGER_LINEAR, tidy


@dataclass(frozen=True)
class ExpandIntegers(Pass[Program]):
    """integer_linear(x, q, s) = x·(s·(q − z))ᵀ + b in aten: a cast, a product by the blocks' scales, a linear map."""

    name: ClassVar[str] = "expand-integers"
    preserves: ClassVar[Equivalence] = "reassociation"

    def apply(self, program: Program) -> Result:
        nodes = [node for node in program.exported.graph.nodes if node.target is INTEGER_LINEAR]
        for node in nodes:
            inline(program.exported, node, list(node.args), _plain, composite=True)
        if nodes:
            tidy(program.exported)
        return Result(len(nodes))


def _plain(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Any, in_features: int, bits: int, block_size: int,
    integer_inputs: bool,
) -> Tensor:  # fmt: skip
    x = rounded_inputs(x, block_size) if integer_inputs else x
    weight = dequantize_integers(Integers(codes, scales), in_features, bits, x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
