"""W = c[q]·m in plain torch: the truth that faster kernels are checked against."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lrcompile.kernels.nf4_dequant.storage import ABSMAX_BLOCK, Nf4, Tables, chunk_of, tables


def decode_absmax(nf4: Nf4, dtype: torch.dtype = torch.float32, constants: Tables | None = None) -> Tensor:
    """m = d[code]·scale + offset, or the stored maxima; in float64 if `dtype` is, else in float32. Shape `[blocks]`."""
    working = torch.float64 if dtype == torch.float64 else torch.float32
    if nf4.absmax_scale is None or nf4.absmax_offset is None:
        return nf4.absmax.to(working)
    dynamic = (constants or tables(nf4.absmax.device)).dynamic.to(working)
    scale = _spread(nf4.absmax_scale.to(working), ABSMAX_BLOCK, nf4.absmax.numel())
    return dynamic[nf4.absmax.int()] * scale + nf4.absmax_offset.to(working)


def _spread(values: Tensor, block_size: int, n: int) -> Tensor:
    return values[:, None].expand(-1, block_size).reshape(-1)[:n]


def dequantize_nf4(
    nf4: Nf4,
    shape: tuple[int, ...],
    block_size: int,
    dtype: torch.dtype = torch.float32,
    *,
    whole: bool = False,
    constants: Tables | None = None,
) -> Tensor:
    """W = c[q]·m, formed in float32 and rounded once to `dtype`; formed in float64 throughout when that is `dtype`.

    Returns a contiguous `shape`. Works a chunk at a time; with `whole` all at once, in ops that a graph can hold.
    """
    n = math.prod(shape)
    constants = constants or tables(nf4.codes.device)
    absmax = decode_absmax(nf4, dtype, constants)
    pairs = constants.pairs.to(absmax.dtype)
    if whole:
        return _scaled(F.embedding(nf4.codes.int(), pairs).view(-1)[:n], absmax, block_size).to(dtype).view(shape)
    chunk = chunk_of(nf4.codes.device)
    weight = torch.empty(n, dtype=dtype, device=nf4.codes.device)
    for start in range(0, n, chunk):
        stop = min(start + chunk, n)
        values = _looked_up(nf4.codes[start // 2 : -(-stop // 2)], pairs)[: stop - start]
        whole_blocks = values.numel() // block_size * block_size
        peaks = absmax[start // block_size : -(-stop // block_size)]
        values[:whole_blocks].view(-1, block_size).mul_(peaks[: whole_blocks // block_size, None])
        if whole_blocks < values.numel():
            values[whole_blocks:].mul_(peaks[-1])
        weight[start:stop] = values
    return weight.view(shape)


def _looked_up(codes: Tensor, pairs: Tensor) -> Tensor:
    if pairs.dtype == torch.float32:
        # A pair moves as one 8-byte word, several times quicker than a row of two; no such cast in graphs.
        return pairs.view(torch.int64).view(-1).index_select(0, codes.int()).view(torch.float32)
    return pairs.index_select(0, codes.int()).view(-1)


def _scaled(unit: Tensor, absmax: Tensor, block_size: int) -> Tensor:
    if unit.numel() % block_size:
        return unit * _spread(absmax, block_size, unit.numel())
    return (unit.view(-1, block_size) * absmax[:, None]).view(-1)
