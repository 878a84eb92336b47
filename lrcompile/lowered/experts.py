"""The routed experts of a mixture, all pairs side by side with a diagonal between that keeps each row's own.

    y' = y + S·(sB̂)ᵀ,   S = C ⊙ (drop(x)·Âᵀ)
    dB̂ = s·dyᵀ·S,   dS = C ⊙ (dy·sB̂),   dÂ = dSᵀ·drop(x),   dx = drop(dS·Â)

A row of S has one expert's rank of elements that are not zero: those are kept, with the row's index, and S is laid out
again from them in the backward pass. No mask is kept, and the code only once.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lrcompile.kernels.dropout.ops import BACKWARD, FORWARD
from lrcompile.kernels.lora_linear import ops as ops  # registers the leaf ops
from lrcompile.lowered.forward import scaled


@dataclass(frozen=True)
class RoutedLora:
    """As `torch.ops.lrcompile.lora_experts`; `seed` is there where the probability `p` is above 0."""

    p: float = 0.0

    __name__ = "routed_lora"

    def __call__(
        self, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: Tensor, experts: Tensor, seed: Tensor | None = None
    ) -> Tensor:
        kind = y.device.type
        with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
            rows = x.to(y.dtype).reshape(-1, x.shape[-1])
            flat = y.reshape(-1, y.shape[-1])
            return _Routed.apply(flat, rows, A, B, scale, experts.reshape(-1), seed, self.p).view(y.shape)


class _Routed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: Tensor, experts: Tensor, seed: Tensor | None,
        p: float,
    ) -> Tensor:  # fmt: skip
        ctx.p, ctx.dtypes = p, (A.dtype, B.dtype)
        _, wants_x, wants_A, wants_B = ctx.needs_input_grad[:4]
        count, rank, _ = A.shape
        dropped = x if seed is None else torch.ops.lrcompile_kernels.drop(x, seed, p, FORWARD)
        code = (dropped @ A.flatten(0, 1).to(x.dtype).t()).unflatten(1, (count, rank))
        S = code.masked_fill(_others(experts, count), 0.0)
        ctx.save_for_backward(
            x if wants_A else None,
            S.sum(1) if wants_B else None,
            experts,
            A if wants_x else None,
            B if wants_x or wants_A else None,
            scale,
            seed,
        )
        ctx.count = count
        return torch.addmm(y, S.flatten(1), _wide(B, scale, y.dtype).t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, compact, experts, A, B, scale, seed = ctx.saved_tensors
        wants_y, wants_x, wants_A, wants_B = ctx.needs_input_grad[:4]
        others = _others(experts, ctx.count)
        S = dS = dx = dA = dB = None
        if wants_B:
            S = compact[:, None, :].expand(-1, ctx.count, -1).masked_fill(others, 0.0).flatten(1)
            rank = compact.shape[1]
        if B is not None:
            rank = B.shape[2]
            wide = _wide(B.view(B.shape), scale, dy.dtype)  # a view: not the forward pass's, which would be kept
            if S is not None:
                dS, dB = torch.ops.lrcompile_kernels.factor_gradients(dy, wide, S)
            else:
                dS = dy @ wide
            dS = dS.unflatten(1, (ctx.count, rank)).masked_fill(others, 0.0).flatten(1)
        elif S is not None:
            dB = dy.t() @ S
        if dB is not None:
            dB = scaled(dB, scale, ctx.dtypes[1]).unflatten(1, (ctx.count, rank)).movedim(1, 0)
        if wants_A:
            assert dS is not None
            dropped = x if seed is None else torch.ops.lrcompile_kernels.drop(x, seed, ctx.p, BACKWARD)
            dA = (dS.t() @ dropped).unflatten(0, (ctx.count, rank)).to(ctx.dtypes[0])
        if wants_x:
            assert dS is not None
            dx = dS @ A.view(A.shape).flatten(0, 1).to(dy.dtype)
            dx = dx if seed is None else torch.ops.lrcompile_kernels.drop(dx, seed, ctx.p, BACKWARD)
        return dy if wants_y else None, dx, dA, dB, None, None, None, None


def _others(experts: Tensor, count: int) -> Tensor:
    """C's zeros `[rows, count, 1]`; a row whose index is no expert has only these."""
    return (experts[:, None] != torch.arange(count, device=experts.device))[:, :, None]


def _wide(B: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """sB̂ `[out, count·rank]` of B `[count, out, rank]`."""
    return scaled(B.movedim(0, 1).flatten(1), scale, dtype)
