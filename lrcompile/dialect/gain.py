"""The dialect's gains: one factor for each output of a map, or for each of its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lrcompile.dialect import LIBRARY
from lrcompile.dialect.plain import unseen

LIBRARY.define("gain(Tensor y, Tensor g, Tensor? kept=None) -> Tensor")
LIBRARY.define("input_gain(Tensor x, Tensor g) -> Tensor")


@torch.library.impl(LIBRARY, "gain", "CompositeImplicitAutograd")
def gain(y: Tensor, g: Tensor, kept: Tensor | None = None) -> Tensor:
    """y + (g − 1) ⊙ (y − c): every output times its gain, but for the part c of it.

    y `[..., out]`, g `[out]`, c whatever broadcasts to y (None: 0). Gains near one keep the digits of g's dtype beside
    a bfloat16 y; a gain of exactly one leaves y's bits alone.
    """
    if y.device.type == "cpu" and unseen(y, g) and is_constant(kept, g):
        result: Tensor = _Gain.apply(y, g, kept)
        return result
    return _sum(y, g, kept)


def is_constant(kept: Tensor | None, g: Tensor) -> bool:
    return kept is None or (kept.shape == g.shape and not kept.requires_grad)


def _sum(y: Tensor, g: Tensor, kept: Tensor | None) -> Tensor:
    moved = y if kept is None else y - kept.to(y.dtype)
    return y + (g - 1).to(y.dtype) * moved


class _Gain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, g: Tensor, kept: Tensor | None) -> Tensor:
        ctx.save_for_backward(y, g, kept)
        return normalized(y, g, kept)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, g, kept = ctx.saved_tensors
        wants = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():  # create_graph=True: the gradients are to have gradients
            given = [each for each, wanted in zip((y, g), wants, strict=True) if wanted]
            found = iter(torch.autograd.grad(_sum(y, g, kept), given, grad, create_graph=True))
            return (*(next(found) if wanted else None for wanted in wants), None)
        dy, dg = normalized_backward(grad, y, g, kept, wants[1])
        return dy if wants[0] else None, dg, None


def normalized(y: Tensor, g: Tensor, kept: Tensor | None) -> Tensor:
    """(y − c)·g + c as a batch normalization by the mean c and the variance 1, with the weight g and the bias c.

    The CPU's kernel reads y once where the sum takes two passes, and rounds 16-bit numbers once. Backward too: one pass
    for Σ dy ⊙ (y − c), one for dy·g and nothing else as wide as y, where the sum takes five and three.
    """
    g, c = _wide(y, g, kept)
    rows = F.batch_norm(y.reshape(-1, y.shape[-1]), c, torch.ones_like(g), g, c, eps=0.0)
    return unviewed(rows, y.shape)


def unviewed(rows: Tensor, shape: Sequence[int]) -> Tensor:
    """`rows` in another shape and no view to autograd, so that who gets it from a custom node may write into it."""
    return torch.ops.aten._unsafe_view.default(rows, shape)


def normalized_backward(
    grad: Tensor, y: Tensor, g: Tensor, kept: Tensor | None, wants_g: bool, spent: bool = False
) -> tuple[Tensor, Tensor | None]:
    """dy = grad·g and dg = Σ grad ⊙ (y − c); `spent`: nobody reads y any more, dy may take its place."""
    rows, y, own = grad.reshape(-1, grad.shape[-1]), y.reshape(-1, y.shape[-1]), g.dtype
    g, c = _wide(y, g, kept)
    if not rows.numel():  # the kernel divides by their number
        return torch.zeros_like(grad), torch.zeros_like(g, dtype=own) if wants_g else None
    # With one dtype the kernel's own pass for dy takes several times as long as a product.
    product = rows.dtype == g.dtype
    dy, dg, _ = torch.ops.aten.native_batch_norm_backward(
        rows, y, g, c, torch.ones_like(g), None, None, False, 0.0, [not product, wants_g, False]
    )
    if product:
        dy = torch.mul(rows, g, out=y) if spent else rows * g
    return dy.view(grad.shape), dg.to(own) if wants_g else None


def _wide(y: Tensor, g: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    g = g.to(torch.promote_types(y.dtype, torch.float32))
    return g, g.new_zeros(g.shape) if kept is None else kept.to(g.dtype)


@torch.library.impl(LIBRARY, "input_gain", "CompositeImplicitAutograd")
def input_gain(x: Tensor, g: Tensor) -> Tensor:
    """x ⊙ (g − 1): what a gain on the inputs adds to them.

    x `[..., in]`, g `[in]`. A map of it beside the map of x is the map of x ⊙ g; g − 1 is formed in g's dtype.
    """
    return x * (g - 1).to(x.dtype)
