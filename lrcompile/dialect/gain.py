"""The dialect's gains: one factor for each output of a map, or for each of its inputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lrcompile.dialect import LIBRARY
from lrcompile.dialect.plain import plain

_EPS = 2.0**-16
"""Some versions of torch refuse 0; 1 − ε and (1 − ε) + ε = 1 are exact in every dtype of a gain."""

LIBRARY.define("gain(Tensor y, Tensor g, Tensor? kept=None) -> Tensor")
LIBRARY.define("input_gain(Tensor x, Tensor g) -> Tensor")


@torch.library.impl(LIBRARY, "gain", "CompositeImplicitAutograd")
def gain(y: Tensor, g: Tensor, kept: Tensor | None = None) -> Tensor:
    """y + (g − 1) ⊙ (y − c) = y ⊙ g + c ⊙ (1 − g): every output times its gain, but for the part c of it.

    y `[..., out]`, g `[out]`, c whatever broadcasts to y (None: 0). Gains near one keep the digits of g's dtype beside
    a bfloat16 y; a gain of exactly one leaves y's bits alone.
    """
    if y.device.type == "cpu" and plain(y, g) and (kept is None or (kept.shape == g.shape and not kept.requires_grad)):
        return _normalized(y, g, kept)
    wide = torch.promote_types(y.dtype, torch.float32)
    if y.dtype == wide or torch.compiler.is_compiling():  # a compiler fuses the casts; else they are as wide as y
        g = g.to(wide)
        scaled = y.to(wide) * g
        return (scaled if kept is None else scaled + kept.to(wide) * (1 - g)).to(y.dtype)
    moved = y if kept is None else y - kept.to(y.dtype)
    return y + (g - 1).to(y.dtype) * moved


def _normalized(y: Tensor, g: Tensor, kept: Tensor | None) -> Tensor:
    """(y − c)·g + c is a batch normalization by the mean c and the variance 1, with the weight g and the bias c.

    Its kernel reads y once where the sum above takes two passes, its backward takes two and nothing as wide as y beside
    the gradient where that of the sum takes five and three; 16-bit numbers are rounded once.
    """
    g = g.to(torch.promote_types(y.dtype, torch.float32))
    c = g.new_zeros(g.shape) if kept is None else kept.to(g.dtype)
    variance = torch.full_like(g, 1 - _EPS)
    return F.batch_norm(y.reshape(-1, y.shape[-1]), c, variance, g, c, eps=_EPS).view(y.shape)


@torch.library.impl(LIBRARY, "input_gain", "CompositeImplicitAutograd")
def input_gain(x: Tensor, g: Tensor) -> Tensor:
    """x ⊙ (g − 1): what a gain on the inputs adds to them.

    x `[..., in]`, g `[in]`. A map of it beside the map of x is the map of x ⊙ g; g − 1 is formed in g's dtype.
    """
    return x * (g - 1).to(x.dtype)
