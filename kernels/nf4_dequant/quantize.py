"""From a float weight to its NF4 codes, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lrcompile.kernels.nf4_dequant.storage import (
    ABSMAX_BLOCK,
    BLOCK_SIZES,
    CODEBOOK,
    DYNAMIC_CODEBOOK,
    Nf4,
    chunk_of,
    constant,
    nf4_shapes,
)

SMALLEST = 1e-38
"""bitsandbytes' floor under a block's maximum: keeps its reciprocal finite, so a block of zeros stays exactly zero."""


def quantize_nf4(weight: Tensor, block_size: int = 64, double_quant: bool = True) -> Nf4:
    """q = #{k : w/m > t_k}, t the midpoints of neighbouring code values (a tie takes the lower code), m = max|w| of the
    block.

    `weight` any floating dtype and shape, not empty; computed in float32. Per element |w − dq(q)| ≤ 0.1519·m. On the
    meta device the result has shapes and dtypes only. ValueError: block size, dtype, an empty weight, a value that is
    NaN or overflows float32.
    """
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size is {block_size!r}; expected one of {', '.join(map(str, BLOCK_SIZES))}")
    if not weight.is_floating_point() or weight.numel() == 0:
        raise ValueError(
            f"NF4 stores a floating weight that is not empty, got {weight.dtype} of shape {tuple(weight.shape)}"
        )
    flat = weight.detach().reshape(-1)
    n, device = flat.numel(), flat.device
    n_codes, n_blocks, n_scales = nf4_shapes(n, block_size)
    codes = torch.empty(n_codes, dtype=torch.uint8, device=device)
    absmax = torch.empty(n_blocks, device=device)
    if flat.is_meta:
        if not double_quant:
            return Nf4(codes, absmax)
        return Nf4(codes, absmax.to(torch.uint8), torch.empty(n_scales, device=device), torch.empty((), device=device))
    thresholds, chunk = _midpoints(CODEBOOK, device), chunk_of(device)
    for start in range(0, n, chunk):
        index, peak = _nearest(flat[start : start + chunk].float(), block_size, thresholds)
        packed = index[0::2] << 4 | index[1::2]
        codes[start // 2 : (start + chunk) // 2] = packed[: n_codes - start // 2]
        absmax[start // block_size : (start + chunk) // block_size] = peak
    if not torch.isfinite(absmax).all():
        raise ValueError("the weight holds NaN or values beyond float32's range, which NF4 cannot represent")
    if not double_quant:
        return Nf4(codes, absmax)
    offset = absmax.mean()
    index, scale = _nearest(absmax - offset, ABSMAX_BLOCK, _midpoints(DYNAMIC_CODEBOOK, device))
    return Nf4(codes, index[:n_blocks].to(torch.uint8), scale, offset)


def _midpoints(values: tuple[float, ...], device: torch.device) -> Tensor:
    table = constant(values, device)
    return (table[:-1] + table[1:]) / 2


def _nearest(flat: Tensor, block_size: int, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """Code of each element (int32, padded to whole blocks with the code of 0) and maximum of each block."""
    blocks = F.pad(flat, (0, -flat.numel() % block_size)).view(-1, block_size)
    peak = blocks.abs().amax(1)
    unit = (blocks * (1.0 / peak.clamp(min=SMALLEST))[:, None]).clamp_(-1, 1)
    return torch.bucketize(unit.view(-1), thresholds, out_int32=True), peak
