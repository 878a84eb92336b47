"""The dialect's op for a gradient that is wanted in a subspace only: the identity forward, a projection backward.

    y' = y,    ∂x = 0,    ∂y = ∂y',    ∂Z = G·Pᵀ = ∂yᵀ(x·Pᵀ)  (right)   or   Pᵀ·G = (∂y·P)ᵀx  (left)

G = ∂yᵀx `[out, in]` is the gradient of the weight that made y of x; neither order of the products ever holds it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lrcompile.dialect import LIBRARY

LIBRARY.define("project_gradient(Tensor y, Tensor x, Tensor Z, Tensor P, bool right) -> Tensor")


@torch.library.impl(LIBRARY, "project_gradient", "CompositeImplicitAutograd")
def project_gradient(y: Tensor, x: Tensor, Z: Tensor, P: Tensor, right: bool) -> Tensor:
    """y itself, which does not depend on Z; what Z receives in the backward pass is the projected gradient of W.

    y `[..., out]`, x `[..., in]`; right: P `[rank, in]`, Z `[out, rank]`, and x·Pᵀ `[..., rank]` is all that is kept
    for the backward pass; left: P `[out, rank]`, Z `[rank, in]`, and x is kept. The products are formed in y's dtype,
    the gradient has Z's. There is no gradient of the gradient: asking for one raises `RuntimeError`.
    """
    return _Projection.apply(y, x, Z, P, right)


def project(dy: Tensor, x: Tensor, P: Tensor, right: bool) -> Tensor:
    """∂Z of a backward pass that has x at hand."""
    P = P.to(dy.dtype)
    return against(dy, x.to(dy.dtype) @ P.t()) if right else against(dy @ P, x.to(dy.dtype))


def against(a: Tensor, b: Tensor) -> Tensor:
    """aᵀb, summed over every leading dimension."""
    return a.reshape(-1, a.shape[-1]).t() @ b.reshape(-1, b.shape[-1])


class _Projection(torch.autograd.Function):
    """Has to be a function of its own, since autograd knows no other way to give a gradient to what has no effect."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, Z: Tensor, P: Tensor, right: bool) -> Tensor:
        ctx.right, ctx.dtype = right, Z.dtype
        if right:
            ctx.save_for_backward(x.to(y.dtype) @ P.to(y.dtype).t())
        else:
            ctx.save_for_backward(x, P)
        return y.detach()  # a view would refuse the in-place activation that may follow

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.right:
            (code,) = ctx.saved_tensors
            dZ = against(dy, code)
        else:
            x, P = ctx.saved_tensors
            dZ = project(dy, x, P, right=False)
        return dy, None, dZ.to(ctx.dtype), None, None
