"""integers-from-nf4: c[q]·m ≈ s·(k − z), the sixteen NF4 levels of a block on a grid of integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from lrcompile.dialect import integers as integers
from lrcompile.errors import SpecError
from lrcompile.integers.blocks import BITS, BLOCK_SIZES, WHOLE_ROW, Integers, dequantize_integers, quantize_integers
from lrcompile.kernels.nf4_dequant import dequantize_nf4
from lrcompile.passes.base import Equivalence, Pass, Program, Result
from lrcompile.passes.nodes import INTEGER_LINEAR, NF4_LINEAR, held_nf4, tidy
from lrcompile.passes.tensors import Tensors, substitute


@dataclass(frozen=True)
class IntegersFromNf4(Pass[Program]):
    """nf4_linear(x, q, m) ≈ integer_linear(x, k, s): for runtimes that multiply integers faster.

    With 8 bits every level is within 1/254 of its block's maximum, a 38th of what NF4 itself rounds by at most; with 4
    bits the weight is rounded once more. `integer_inputs`: the runtime may round each block of x to 8 bits as well,
    which is what makes its kernels fast. A block size of 0 is one scale for each row, of W and of x. Errors are the
    root mean square of Ŵ − W over a block, in units of max|W|/(2^(bits−1) − 1) there.
    """

    name: ClassVar[str] = "integers-from-nf4"
    preserves: ClassVar[Equivalence] = "approximate"
    tolerance: ClassVar[float] = 0.5 * (1 + 2**-16)
    bits: int = 8
    block_size: int = 32
    integer_inputs: bool = True

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise SpecError(f"bits={self.bits} is not valid: choose one of {BITS}", field="bits")
        if self.block_size not in (WHOLE_ROW, *BLOCK_SIZES):
            message = f"block_size={self.block_size} is not valid: choose one of {BLOCK_SIZES}, or 0 for whole rows"
            raise SpecError(message, field="block_size")

    def apply(self, program: Program) -> Result:
        tensors, errors = Tensors(program.exported), {}
        held: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
        nodes = [node for node in program.exported.graph.nodes if node.target is NF4_LINEAR]
        for node in nodes:
            x, codes, absmax, scale, offset, bias, out, inside, block, transposed, _ = node.args
            if codes not in held:
                name = tensors.targets[codes.name].removesuffix("_codes")
                nf4 = held_nf4(tensors, (codes, absmax, scale, offset))
                weight = dequantize_nf4(nf4, (inside, out) if transposed else (out, inside), block)
                weight = weight.t() if transposed else weight
                stored = quantize_integers(weight, self.bits, self.block_size)
                errors[name] = self._error(weight, stored)
                names = (f"{name}_int{self.bits}", f"{name}_scales")
                held[codes] = tuple(tensors.add(*each, codes) for each in zip(names, stored, strict=True))  # type: ignore[assignment]
            self._replace(program, node, x, held[codes], bias, inside)
        if nodes:
            tidy(program.exported)
        return Result(len(nodes), errors=errors)

    def _replace(
        self, program: Program, node: fx.Node, x: Any, held: tuple[fx.Node, fx.Node], bias: Any, inside: Any
    ) -> None:
        with program.exported.graph.inserting_before(node):
            block = held[0].meta["val"].shape[-1] * 8 // self.bits
            arguments = (x, *held, bias, inside, self.bits, block, self.integer_inputs)
            made = program.exported.graph.call_function(INTEGER_LINEAR, arguments)
        made.meta = dict(node.meta)
        substitute(program.exported, node, made)

    def _error(self, weight: Tensor, stored: Integers) -> float:
        gap = dequantize_integers(stored, weight.shape[1], self.bits) - weight
        block = stored.codes.shape[-1] * 8 // self.bits
        step = _blocks(weight, block).abs().amax(-1) / (2 ** (self.bits - 1) - 1)
        wrong = _blocks(gap, block).square().mean(-1).sqrt()
        return float((wrong / step.clamp_min(torch.finfo(step.dtype).tiny)).max())


def _blocks(weight: Tensor, block_size: int) -> Tensor:
    return F.pad(weight, (0, -weight.shape[1] % block_size)).unflatten(1, (-1, block_size))
