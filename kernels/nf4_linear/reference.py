"""NF4: w ≈ c[q]·m, q the 4-bit code of an element and m = max|w| of its block of consecutive elements  (arXiv
2305.14314).

Codes, thresholds, packing and double quantization are bitsandbytes', bit for bit away from ties (where its own CPU and
CUDA paths disagree): a stored model reads the same in either library. Everything here is plain torch; a faster kernel
is checked against it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# fmt: off
CODEBOOK = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
ABSMAX_BLOCK = 256
"""Block maxima that share one second-level maximum under double quantization."""
CHUNK = {"cpu": 1 << 17}
"""Elements worked on at a time: bounds the temporaries of a weight of any size, and keeps a CPU within its cache."""
CHUNK_ELSEWHERE = 1 << 23
SMALLEST = 1e-38
"""bitsandbytes' floor under a block's maximum: keeps its reciprocal finite, so a block of zeros stays exactly zero."""


def _dynamic_codebook() -> tuple[float, ...]:
    """0, 1 and ±10^(i−6)·midpoints of linspace(0.1, 1, 2^i + 1), i = 0…6: 256 values, dense near zero.

    Written out in the roundings of `torch.linspace`, which bitsandbytes uses, so that the table is the same on every
    machine.
    """
    first, last = np.float32(0.1), np.float32(1.0)
    values = [0.0, 1.0]
    for i in range(7):
        steps = 2**i
        step = float((last - first) / np.float32(steps))
        rising = [float(first) + step * k for k in range((steps + 1) // 2)]
        falling = [1.0 - step * (steps - k) for k in range((steps + 1) // 2, steps + 1)]
        edges = np.array([*rising, *falling], np.float32)
        middles = (edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0 ** (i - 6))
        values += [*middles.tolist(), *(-middles).tolist()]
    return tuple(sorted(values))


DYNAMIC_CODEBOOK = _dynamic_codebook()


class Nf4(NamedTuple):
    """One weight in storage: flat, row-major, blocks running across row ends, the last one possibly short.

    codes uint8 `[⌈n/2⌉]`, element 2i in the high nibble · absmax float32 `[⌈n/block⌉]`; or, double-quantized, uint8 of
    that shape with absmax_scale float32 `[⌈blocks/256⌉]` and absmax_offset float32 0-d: absmax = d[code]·scale +
    offset.
    """

    codes: Tensor
    absmax: Tensor
    absmax_scale: Tensor | None = None
    absmax_offset: Tensor | None = None


class Tables(NamedTuple):
    """The constants in float32: `pairs` `[256, 2]` decodes a byte into two values, `dynamic` `[256]` a maximum."""

    pairs: Tensor
    dynamic: Tensor


def tables(device: torch.device) -> Tables:
    """Fresh tensors; they cross from host to device, so a kernel called often keeps them."""
    values = _constant(CODEBOOK, device)
    pairs = torch.stack([values[:, None].expand(16, 16), values[None, :].expand(16, 16)], -1)
    return Tables(pairs.view(256, 2), _constant(DYNAMIC_CODEBOOK, device))


def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """`torch.tensor` detaches in place, which a decomposition may not do while a graph is exported."""
    return torch.ops.aten.lift_fresh_copy(torch.from_numpy(np.array(values, np.float32))).to(device)


def nf4_shapes(numel: int, block_size: int) -> tuple[int, int, int]:
    """Lengths of codes, absmax and (double-quantized) absmax_scale for a weight of `numel` elements."""
    blocks = -(-numel // block_size)
    return -(-numel // 2), blocks, -(-blocks // ABSMAX_BLOCK)


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
    thresholds, chunk = _midpoints(CODEBOOK, device), CHUNK.get(device.type, CHUNK_ELSEWHERE)
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
    table = _constant(values, device)
    return (table[:-1] + table[1:]) / 2


def _nearest(flat: Tensor, block_size: int, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """Code of each element (int32, padded to whole blocks with the code of 0) and maximum of each block."""
    blocks = F.pad(flat, (0, -flat.numel() % block_size)).view(-1, block_size)
    peak = blocks.abs().amax(1)
    unit = (blocks * (1.0 / peak.clamp(min=SMALLEST))[:, None]).clamp_(-1, 1)
    return torch.bucketize(unit.view(-1), thresholds, out_int32=True), peak


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
    chunk = CHUNK.get(nf4.codes.device.type, CHUNK_ELSEWHERE)
    weight = torch.empty(n, dtype=dtype, device=nf4.codes.device)
    for start in range(0, n, chunk):
        stop = min(start + chunk, n)
        values = _looked_up(nf4.codes[start // 2 : -(-stop // 2)], pairs)[: stop - start]
        weight[start:stop] = _scaled(values, absmax[start // block_size : -(-stop // block_size)], block_size)
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


def nf4_linear(
    x: Tensor,
    nf4: Nf4,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
    block_size: int,
    transposed: bool,
    compute_dtype: torch.dtype,
    *,
    whole: bool = False,
    constants: Tables | None = None,
) -> Tensor:
    """y = x·dq(W)ᵀ + b, or x·dq(W) + b when W is stored transposed, `[in, out]`.

    x `[..., in]`, bias `[out]`; weight, product and sum in `compute_dtype`, y `[..., out]` contiguous in x's dtype.
    """
    shape = (in_features, out_features) if transposed else (out_features, in_features)
    weight = dequantize_nf4(nf4, shape, block_size, compute_dtype, whole=whole, constants=constants)
    rows = x.to(compute_dtype).reshape(math.prod(x.shape[:-1]), in_features)
    y = F.linear(rows, weight.t() if transposed else weight, None if bias is None else bias.to(compute_dtype))
    return y.view(*x.shape[:-1], out_features).to(x.dtype)
