"""y = x·Wᵀ + b + S·Bᵀ in float32: a linear map and the second half of a low-rank pair beside it, S = s·x·Aᵀ the first.

What autograd makes of it is the truth for every product of the schedules: dS = dy·B, dB = dyᵀ·S, dx = dy·W + dS·(sA).
"""

from __future__ import annotations

import torch
from torch import Tensor


def lora_linear(x: Tensor, W: Tensor, bias: Tensor | None, S: Tensor, B: Tensor) -> Tensor:
    """x `[rows, in]`, W `[out, in]`, bias `[out]`, S `[rows, rank]`, B `[out, rank]`; y `[rows, out]`.

    In float32, or in float64 throughout where x is.
    """
    x, W, S, B = wide(x), wide(W), wide(S), wide(B)
    y = x @ W.t() + S @ B.t()
    return y if bias is None else y + wide(bias)


def wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
