"""What Triton kernels on NF4 weights share: the tables on the device, and the block maxima."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrcompile.kernels.nf4_dequant.storage import ABSMAX_BLOCK, CODEBOOK, DYNAMIC_CODEBOOK, constant

MAXIMA_OF_A_SCALE = tl.constexpr(ABSMAX_BLOCK)


@cache
def codebook(device: torch.device) -> Tensor:
    """c `[16]` in float32."""
    return constant(CODEBOOK, device)


@cache
def dynamic(device: torch.device) -> Tensor:
    """d `[256]` in float32."""
    return constant(DYNAMIC_CODEBOOK, device)


@triton.jit
def block_maxima(block, absmax, absmax_scale, absmax_offset, dynamic):
    """m of the blocks of these numbers, all of which exist."""
    return decoded_maxima(tl.load(absmax + block), block, absmax_scale, absmax_offset, dynamic)


@triton.jit
def decoded_maxima(held, block, absmax_scale, absmax_offset, dynamic):
    """d[code]·scale + offset where the maxima are quantized too, else what is held."""
    if absmax_scale is not None:
        scale = tl.load(absmax_scale + block // MAXIMA_OF_A_SCALE)
        held = tl.load(dynamic + held.to(tl.int32)) * scale + tl.load(absmax_offset)
    return held


def word_aligned(tensor: Tensor) -> Tensor:
    """The same where kernels may read it sixteen bytes at a time: almost always where it is."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
