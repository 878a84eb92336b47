"""Linear maps of one input, each with low-rank factors beside it: one forward and one backward for all of them.

    yᵢ = x·Wᵢᵀ + bᵢ + Sᵢ·(sᵢBᵢ)ᵀ,   S = x·[A₁; …; Aₙ]ᵀ
    dx = Σ dyᵢ·Wᵢ + dS·[A₁; …; Aₙ],   dSᵢ = dyᵢ·(sᵢBᵢ),   dBᵢ = sᵢ·dyᵢᵀ·Sᵢ,   dAᵢ = dSᵢᵀ·x

x is read once for S and once for dA; S is kept and dS formed once, the least that trains both factors: 6Tr(i + o)
beside the 4Tio of the frozen maps. Only what a gradient needs is saved: S for B, x for A, nothing for frozen factors.
With dropout a code reads drop(x) in place of x, drawn again from its seed in the backward pass. Orders of contraction
other than this one are in `contractions`.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lrcompile.lowered.backward import gradients
from lrcompile.lowered.bases import FORWARD
from lrcompile.lowered.diagonals import formed
from lrcompile.lowered.forward import codes, merged, outputs
from lrcompile.lowered.members import Group, Wanted


@dataclass(frozen=True)
class AdaptedGroup(Group):
    """Callable: x `[..., in]` and the flat tensors of `Operands` to the tuple of yᵢ `[..., outᵢ]`.

    Computes in x's dtype, or autocast's where that is on; factors of another dtype are cast, and their gradients cast
    back.
    """

    __name__ = "adapted_group"

    def __call__(self, x: Tensor, *operands: Tensor | None) -> tuple[Tensor, ...]:
        kind = x.device.type
        casts = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
        dtype = torch.get_autocast_dtype(kind) if casts else x.dtype
        with torch.autocast(kind, enabled=False) if casts else nullcontext():
            rows = x.to(dtype).reshape(-1, x.shape[-1])
            ys = _Group.apply(self, rows, *operands)
        return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in ys)


class _Group(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: AdaptedGroup, x: Tensor, *operands: Any) -> tuple[Tensor, ...]:
        given = group.split(operands)
        dtypes = group.split([None if each is None else each.dtype for each in operands])
        wanted = Wanted(group, ctx.needs_input_grad[1], group.split(ctx.needs_input_grad[2:]), dtypes)
        acting = formed(given, FORWARD)
        S = codes(wanted, acting, x)
        Ms = merged(group, acting, x.dtype)
        ys = outputs(group, acting, x, S, Ms)

        ctx.wanted = wanted
        reads_x = any(map(wanted.A, range(group.codes))) or any(map(wanted.G, range(len(group.members))))
        ctx.save_for_backward(
            x if reads_x else None,
            *(S[code] if wanted.S(code) else None for code in range(group.codes)),
            *(M if wanted.x else None for M in Ms),
            *wanted.kept(given).flat(),
        )
        return ys

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Any, ...]:
        group = ctx.wanted.group
        x, *saved = ctx.saved_tensors
        S, rest = saved[: group.codes], saved[group.codes :]
        Ms, given = rest[: len(group.members)], group.split(rest[len(group.members) :])
        dx, found = gradients(ctx.wanted, given, x, S, Ms, dys)
        cast = [
            None if gradient is None else gradient.to(dtype)
            for gradient, dtype in zip(found.flat(), ctx.wanted.dtypes.flat(), strict=True)
        ]
        return None, dx, *cast
