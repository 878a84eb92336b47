"""Symmetric quantization in blocks of a row: w ≈ s·(q − 2^(bits−1)), one scale s for `block_size` inputs of one output.

The layout is that of ONNX Runtime's MatMulNBits, which multiplies by the codes as they are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BITS = (4, 8)
BLOCK_SIZES = (16, 32, 64, 128, 256)
WHOLE_ROW = 0
"""As a block size: one scale for each output."""
_SHRUNK = (1.0, 0.95, 0.9, 0.85, 0.8)
_ROWS = 1 << 20  # elements worked on at a time


class Integers(NamedTuple):
    """A weight `[out, in]`: codes uint8 `[out, blocks, block·bits/8]`, of two 4-bit ones the earlier in the low nibble;
    scales float32 `[out, blocks]`; the last block of a row may be short, its rest stands for 0.
    """

    codes: Tensor
    scales: Tensor


def quantize_integers(weight: Tensor, bits: int, block_size: int) -> Integers:
    """q = round(w/s) + 2^(bits−1), s the scale of the least squared error among a few, for each block.

    Tried are max|w|/top, top = 2^(bits−1) − 1, and for 4 bits also shares of that, and of the scale that makes the
    largest element the code 0, which has a step more to its side; values beyond the last code are clipped. So the root
    mean square error of a block is at most max|w|/(2·top). Formed in float32. ValueError: bits, block size, a weight
    that is no floating matrix or holds values that are not finite.
    """
    if bits not in BITS or block_size not in (WHOLE_ROW, *BLOCK_SIZES):
        expected = f"{BITS} and of {(*BLOCK_SIZES, WHOLE_ROW)}"
        raise ValueError(f"bits is {bits!r}, block_size {block_size!r}; expected one of {expected}")
    if not weight.is_floating_point() or weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"expected a floating matrix, got {weight.dtype} of shape {tuple(weight.shape)}")
    if not torch.isfinite(weight).all():
        raise ValueError("the weight holds values that are not finite")
    out, inside = weight.shape
    block_size = block_size or inside + inside % 2  # two codes of 4 bits share a byte
    count = -(-inside // block_size)
    codes = torch.empty(out, count, block_size * bits // 8, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(out, count, device=weight.device)
    rows = max(1, _ROWS // (count * block_size))
    for start in range(0, out, rows):
        part = weight.detach()[start : start + rows].float()
        blocks = F.pad(part, (0, -inside % block_size)).view(len(part), count, block_size)
        index, scales[start : start + rows] = _best(blocks, bits)
        codes[start : start + rows] = index if bits == 8 else index[..., 0::2] | index[..., 1::2] << 4
    return Integers(codes, scales)


def _best(blocks: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    zero, top = 2 ** (bits - 1), 2 ** (bits - 1) - 1
    peak = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    tried = [peak.abs() / top]
    if bits == 4:
        tried += [peak.abs() / top * share for share in _SHRUNK[1:]] + [-peak / zero * share for share in _SHRUNK]
    index = scale = error = None
    for each in tried:
        levels = (blocks / torch.where(each == 0, 1.0, each)).round_().clamp_(-zero, top)
        wrong = (levels * each - blocks).square_().sum(-1, keepdim=True)
        if index is None or scale is None or error is None:
            index, scale, error = levels, each, wrong
        else:
            better = wrong < error
            index = torch.where(better, levels, index)
            scale, error = torch.where(better, each, scale), torch.where(better, wrong, error)
    assert index is not None
    assert scale is not None
    return (index + zero).to(torch.uint8), scale.squeeze(-1)


def dequantize_integers(held: Integers, in_features: int, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """s·(q − 2^(bits−1)) as `[out, in]`, formed in float32 and rounded to `dtype`, in float64 where that is `dtype`."""
    codes = held.codes
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    values = (codes.to(wide) - 2 ** (bits - 1)) * held.scales.to(wide).unsqueeze(-1)
    return values.flatten(1)[:, :in_features].to(dtype)


def rounded_inputs(x: Tensor, block_size: int) -> Tensor:
    """x as kernels with integer inputs see it: r·round(x/r), r = max|x|/127 over each block of the last dimension."""
    inside = x.shape[-1]
    blocks = F.pad(x, (0, -inside % block_size)).unflatten(-1, (-1, block_size))
    step = blocks.abs().amax(-1, keepdim=True) / 127
    rounded = (blocks / torch.where(step == 0, 1.0, step)).round() * step
    return rounded.flatten(-2)[..., :inside]
