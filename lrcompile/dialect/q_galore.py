"""Q-GaLore's ops (arXiv 2407.08296): a linear map on INT8 codes, and a projected gradient on an INT4 projection.

Both keep codes for the backward pass, never what they stand for, which is formed anew where it is used.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lrcompile.dialect import LIBRARY
from lrcompile.dialect.galore import against, project
from lrcompile.int8.groups import Groups, dequantize_groups

LIBRARY.define(
    "int8_linear(Tensor x, Tensor codes, Tensor scale, Tensor offset, Tensor? bias, int rows, int columns, "
    "bool transposed, ScalarType dtype) -> Tensor"
)
LIBRARY.define(
    "project_gradient_int4(Tensor y, Tensor x, Tensor Z, Tensor codes, Tensor scale, Tensor offset, bool right)"
    " -> Tensor"
)


@torch.library.impl(LIBRARY, "int8_linear", "CompositeImplicitAutograd")
def int8_linear(
    x: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, bias: Tensor | None, rows: int, columns: int,
    transposed: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """x·Wᵀ + b with W = offset + scale·codes in `dtype`; `[rows, columns]` is `[out, in]`, or its transpose.

    x `[..., in]`, codes and the rest as `int8.groups.Groups` with 8 bits. δx = δy·W in x's dtype.
    """
    return _Int8Linear.apply(x, Groups(codes, scale, offset), bias, (rows, columns), transposed, dtype)


@torch.library.impl(LIBRARY, "project_gradient_int4", "CompositeImplicitAutograd")
def project_gradient_int4(
    y: Tensor, x: Tensor, Z: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, right: bool
) -> Tensor:
    """As `project_gradient`, P being held in groups of 4 bits; only as orthonormal as these can be."""
    return _Int4Projection.apply(y, x, Z, codes, scale, offset, right)


class _Int8Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, held: Groups, bias: Tensor | None, shape: tuple[int, int], transposed: bool,
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(*held)
        ctx.stored, ctx.dtypes = (shape, transposed), (x.dtype, None if bias is None else bias.dtype)
        return F.linear(x, _stored(held, shape, transposed, dtype), bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = db = None
        if ctx.needs_input_grad[0]:
            shape, transposed = ctx.stored
            W = _stored(Groups(*ctx.saved_tensors), shape, transposed, dy.dtype)
            dx = (dy @ W).to(ctx.dtypes[0])
        if ctx.needs_input_grad[2]:
            db = dy.reshape(-1, dy.shape[-1]).sum(0).to(ctx.dtypes[1])
        return dx, None, db, None, None, None


def _stored(held: Groups, shape: tuple[int, int], transposed: bool, dtype: torch.dtype) -> Tensor:
    W = dequantize_groups(held, shape, 8, dtype)
    return W.t() if transposed else W


class _Int4Projection(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, Z: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, right: bool
    ) -> Tensor:
        held = Groups(codes, scale, offset)
        ctx.dtype, ctx.right = Z.dtype, right
        ctx.shape = (Z.shape[1], x.shape[-1]) if right else (y.shape[-1], Z.shape[0])
        if right:
            ctx.save_for_backward(x.to(y.dtype) @ dequantize_groups(held, ctx.shape, 4, y.dtype).t())
        else:
            ctx.save_for_backward(x, *held)
        return y.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.right:
            (code,) = ctx.saved_tensors
            dZ = against(dy, code)
        else:
            x, *held = ctx.saved_tensors
            dZ = project(dy, x, dequantize_groups(Groups(*held), ctx.shape, 4, dy.dtype), right=False)
        return dy, None, dZ.to(ctx.dtype), None, None, None, None
