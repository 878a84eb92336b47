"""LoRA with dropout, whose mask is drawn from a seed in each pass and kept in none.

S = drop(x)·Aᵀ,    dA = dSᵀ·drop(x),    dx = drop(dS·A),    drop(x) = x ⊙ m(seed)
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lrcompile.kernels.dropout.ops import BACKWARD, FORWARD


def seed_on(device: torch.device) -> Tensor:
    """A seed from torch's generator of `device`, which `torch.manual_seed` and checkpoints rule over."""
    return torch.randint(2**62, (), device=device)


@dataclass(frozen=True)
class ReplayedLora:
    """y + s·(drop(x)Aᵀ)Bᵀ as `torch.ops.lrcompile.lora`, the mask being that of `seed`."""

    p: float

    __name__ = "replayed_lora"

    def __call__(self, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: Tensor, seed: Tensor) -> Tensor:
        kind = y.device.type
        # Inside, autocast would take the code's dtype for y's.
        with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
            code = dropped_code(x.to(y.dtype), A.to(y.dtype), seed, self.p) * scale.to(y.dtype)
            return y + F.linear(code, B.to(y.dtype))


def dropped_code(x: Tensor, A: Tensor, seed: Tensor, p: float) -> Tensor:
    """drop(x)·Aᵀ  `[..., rank]` for x `[..., in]` and A `[rank, in]` of one dtype; x is kept only where A trains."""
    rows = x.reshape(-1, x.shape[-1])
    return _DroppedCode.apply(rows, A, seed, p).view(*x.shape[:-1], A.shape[0])


class _DroppedCode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, seed: Tensor, p: float) -> Tensor:
        ctx.p = p
        wants_x, wants_A = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if wants_A else None, A if wants_x else None, seed)
        return torch.ops.lrcompile_kernels.drop(x, seed, p, FORWARD) @ A.t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dS: Tensor) -> tuple[Tensor | None, ...]:
        x, A, seed = ctx.saved_tensors
        drop = torch.ops.lrcompile_kernels.drop
        dx = None if A is None else drop(dS @ A, seed, ctx.p, BACKWARD)
        dA = None if x is None else dS.t() @ drop(x, seed, ctx.p, BACKWARD)
        return dx, dA, None, None
