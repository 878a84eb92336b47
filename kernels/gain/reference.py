"""y' = (y − c) ⊙ m/n + c in float32: a gain for each output, but for the part c of it.

What autograd makes of it is the truth for the gradient of m.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gained(y: Tensor, m: Tensor, n: Tensor | None, kept: Tensor | None) -> Tensor:
    """y `[..., out]`, m and n `[out]`, c `kept` `[out]`. In float32, or in float64 throughout where y is."""
    dtype = torch.promote_types(y.dtype, torch.float32)
    g = m.to(dtype) if n is None else m.to(dtype) / n.to(dtype)
    c = 0 if kept is None else kept.to(dtype)
    return (y.to(dtype) - c) * g + c
