"""A frozen linear map with a low-rank pair beside it where nothing is compiled: one node of autograd.

    y = xWᵀ + b + S·Bᵀ,  S = s·xAᵀ          dx = dy·W + dS·A,  dS = s·dy·B,  dB = dyᵀ·S,  dA = dSᵀ·x

The narrow products are accumulated where the base has left its output and its gradient; as nodes of their own they cost
a buffer and two passes as wide as y and x each. The wide product stays the base's own, so the result is the base's to
the bit where B = 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lrcompile.dialect.gain import is_constant, normalized, normalized_backward, unviewed
from lrcompile.dialect.plain import unseen
from lrcompile.errors import AdapterError

Base = Callable[[Tensor], Tensor]


def fits(x: Tensor, W: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> bool:
    """Do only the numbers count, and are the weight and the scale constants?"""
    kind = x.device.type
    return (
        unseen(x, W, A, B)
        and x.dtype == W.dtype
        and not (W.requires_grad or scale.requires_grad)
        and A.dim() == B.dim() == 2
        and not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind))
    )


def beside(
    base: Base, x: Tensor, W: Tensor, A: Tensor, B: Tensor, scale: Tensor, g: Tensor | None = None,
    kept: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """ŷ = base(x) + s·(xAᵀ)Bᵀ  (arXiv 2106.09685), or ŷ + (g − 1) ⊙ (ŷ − c), in x's dtype and for tensors that `fits`.

    `base` returns xWᵀ + b `[..., out]` as a tensor nobody else holds; x `[..., in]`, W `[out, in]` in any storage
    order, A `[rank, in]`, B `[out, rank]`, scale 0-d, g and the constant c (`kept`; None: 0) `[out]`.
    """
    if g is not None and not (x.device.type == "cpu" and is_constant(kept, g)):
        y = _Beside.apply(base, x, W, A, B, scale, None, None)
        return torch.ops.lrcompile.gain.default(y, g, kept)
    return _Beside.apply(base, x, W, A, B, scale, g, kept)


class _Beside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, base: Base, x: Tensor, W: Tensor, A: Tensor, B: Tensor, scale: Tensor, *gain: Any) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        S = (rows @ A.to(x.dtype).t()).mul_(scale)  # first, as long as x is near
        y = base(x)
        y.view(-1, y.shape[-1]).addmm_(S, B.to(x.dtype).t())
        _, wants_x, _, wants_A, wants_B, *_ = ctx.needs_input_grad
        g, kept = gain
        ctx.base = base
        ctx.save_for_backward(
            x if wants_A else None, W if wants_x else None, A, B, scale, S if wants_B else None,
            None if g is None else y, g, kept,
        )  # fmt: skip
        return unviewed(y, y.shape) if g is None else normalized(y, g, kept)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return _differentiably(ctx, dy)
        x, W, A, B, scale, S, y, g, kept = ctx.saved_tensors
        _, wants_x, _, wants_A, wants_B, _, wants_g, _ = ctx.needs_input_grad
        dx = dA = dB = dg = None
        if g is not None:
            last = not torch._C._autograd._get_current_graph_task_keep_graph()
            dy, dg = normalized_backward(dy, y, g, kept, wants_g, spent=last)
        rows = dy.reshape(-1, dy.shape[-1])
        dS = (rows @ B.to(dy.dtype)).mul_(scale) if wants_x or wants_A else None
        if wants_B:
            dB = (S.t() @ rows).t().to(B.dtype)  # a third faster than rowsᵀ·S where rows are many
        if wants_x:
            dx = (rows @ W).addmm_(dS, A.to(dy.dtype)).view(*dy.shape[:-1], A.shape[1])
        if wants_A:
            dA = (dS.t() @ x.reshape(-1, x.shape[-1])).to(A.dtype)  # type: ignore[union-attr]
        return None, dx, None, dA, dB, None, dg, None


def _differentiably(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients as functions that have gradients, for `create_graph=True`."""
    x, _, A, B, scale, _, _, g, kept = ctx.saved_tensors
    if x is None:
        raise AdapterError(
            "gradients of gradients need the input of an adapter whose A is frozen, and it is not kept; train A, or"
            " leave out create_graph=True"
        )
    y = torch.ops.lrcompile.lora.default(ctx.base(x), x, A, B, scale, 0.0)
    if g is not None:
        y = torch.ops.lrcompile.gain.default(y, g, kept)
    wanted = {index: each for index, each in ((1, x), (3, A), (4, B), (6, g)) if ctx.needs_input_grad[index]}
    found = iter(torch.autograd.grad(y, list(wanted.values()), dy, create_graph=True))
    return tuple(next(found) if index in wanted else None for index in range(8))
