"""`lrcompile::integer_linear`: y = x·Wᵀ + b with W in blocks of small integers, kept as codes for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lrcompile.dialect import LIBRARY
from lrcompile.integers.blocks import Integers, dequantize_integers, rounded_inputs

LIBRARY.define(
    "integer_linear(Tensor x, Tensor codes, Tensor scales, Tensor? bias, int in_features, int bits, int block_size, "
    "bool integer_inputs) -> Tensor"
)


@torch.library.impl(LIBRARY, "integer_linear", "CompositeImplicitAutograd")
def integer_linear(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, in_features: int, bits: int, block_size: int,
    integer_inputs: bool,
) -> Tensor:  # fmt: skip
    """x·Wᵀ + b, W = s·(q − 2^(bits−1)) in x's dtype; δx = δy·W.

    x `[..., in]`, codes and scales as `integers.blocks.Integers`. With `integer_inputs` (for deployed graphs, not for
    training: nothing flows back through a rounding) each block of x is rounded to 8 bits first, as kernels do that
    multiply integers.
    """
    if integer_inputs:
        x = rounded_inputs(x, block_size)
    return _IntegerLinear.apply(x, Integers(codes, scales), bias, in_features, bits)


class _IntegerLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, held: Integers, bias: Tensor | None, in_features: int, bits: int) -> Tensor:
        ctx.save_for_backward(*held)
        ctx.stored, ctx.bias_dtype = (in_features, bits), None if bias is None else bias.dtype
        return F.linear(x, dequantize_integers(held, in_features, bits, x.dtype),
                        None if bias is None else bias.to(x.dtype))  # fmt: skip

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = db = None
        if ctx.needs_input_grad[0]:
            in_features, bits = ctx.stored
            dx = dy @ dequantize_integers(Integers(*ctx.saved_tensors), in_features, bits, dy.dtype)
        if ctx.needs_input_grad[2]:
            wide = torch.promote_types(dy.dtype, ctx.bias_dtype)
            db = dy.reshape(-1, dy.shape[-1]).sum(0, dtype=wide).to(ctx.bias_dtype)
        return dx, None, db, None, None
