"""The mask of a seed in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def mask(like: Tensor, p: float, seed: int) -> Tensor:
    """0 with probability p, 1/(1 − p) otherwise, of the shape, dtype and device of `like`.

    By shape and seed alone: laid out in order whatever the strides of `like` are. 0 ≤ p < 1.
    """
    if like.is_meta:
        return torch.empty_like(like)
    generator = torch.Generator(like.device).manual_seed(seed)
    drawn = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    return drawn.bernoulli_(1 - p, generator=generator).div_(1 - p)
