"""The dialect's gains: one factor for each output of a map, or for each of its inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from lrcompile.dialect import LIBRARY

LIBRARY.define("gain(Tensor y, Tensor g, Tensor? kept=None) -> Tensor")
LIBRARY.define("input_gain(Tensor x, Tensor g) -> Tensor")


@torch.library.impl(LIBRARY, "gain", "CompositeImplicitAutograd")
def gain(y: Tensor, g: Tensor, kept: Tensor | None = None) -> Tensor:
    """y + (g − 1) ⊙ (y − c): every output times its gain, but for the part c of it.

    y `[..., out]`, g `[out]`, c whatever broadcasts to y (None: 0). g − 1 is formed in g's dtype, so that gains near
    one keep their digits beside a bfloat16 y; a gain of exactly one leaves y's bits alone.
    """
    moved = y if kept is None else y - kept.to(y.dtype)
    return y + (g - 1).to(y.dtype) * moved


@torch.library.impl(LIBRARY, "input_gain", "CompositeImplicitAutograd")
def input_gain(x: Tensor, g: Tensor) -> Tensor:
    """x ⊙ (g − 1): what a gain on the inputs adds to them.

    x `[..., in]`, g `[in]`. A map of it beside the map of x is the map of x ⊙ g; g − 1 is formed in g's dtype.
    """
    return x * (g - 1).to(x.dtype)
