"""A gain on the outputs of a map, y' = (y − c) ⊙ g + c, whose gradients are one operation: dy = dy' ⊙ g and
∂g = Σ dy' ⊙ (y − c).

y' stays open to a compiler, to be fused with what follows. Nothing is kept but y.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lrcompile.kernels.gain import ops as ops  # registers the leaf op


@dataclass(frozen=True)
class Gain:
    """As `torch.ops.lrcompile.gain(y, m/n, kept)` of a graph that is compiled, m trained; n None for ones."""

    __name__ = "gain"

    def __call__(self, y: Tensor, m: Tensor, n: Tensor | None, kept: Tensor | None) -> Tensor:
        return _Gain.apply(y, m, n, kept)


class _Gain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, m: Tensor, n: Tensor | None, kept: Tensor | None) -> Tensor:
        ctx.save_for_backward(y, m, n, kept)
        g = _quotient(y, m, n)
        scaled = y.to(g.dtype) * g
        return (scaled if kept is None else scaled + kept.to(g.dtype) * (1 - g)).to(y.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        y, m, n, kept = ctx.saved_tensors
        dy, dm = torch.ops.lrcompile_kernels.gain_gradients(dy, y, m, n, kept)
        return dy, dm, None, None


def _quotient(y: Tensor, m: Tensor, n: Tensor | None) -> Tensor:
    """g in float32 or wider."""
    wide = torch.promote_types(y.dtype, torch.float32)
    return m.to(wide) if n is None else m.to(wide) / n.to(wide)
