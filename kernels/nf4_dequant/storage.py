"""How an NF4 weight is stored: w ≈ c[q]·m, q the 4-bit code of an element, m = max|w| of its block of consecutive
elements  (arXiv 2305.14314).

Codes, thresholds, packing and double quantization are bitsandbytes', bit for bit away from ties (where its own CPU and
CUDA paths disagree): a stored model reads the same in either library.
"""

from __future__ import annotations

import math
from functools import cache
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
CHUNK = 1 << 17
"""Elements that plain torch works on at a time on a CPU: bounds the temporaries of any weight, keeps them cached."""
CHUNK_ELSEWHERE = 1 << 23


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
    """Fresh tensors; they cross from host to device, so a kernel called often keeps them (`kept_tables`)."""
    values = constant(CODEBOOK, device)
    pairs = torch.stack([values[:, None].expand(16, 16), values[None, :].expand(16, 16)], -1)
    return Tables(pairs.view(256, 2), constant(DYNAMIC_CODEBOOK, device))


kept_tables = cache(tables)
"""Only eager kernels may use these: they run on real tensors, where a graph being traced holds fake ones."""


def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """`torch.tensor` detaches in place, which a decomposition may not do while a graph is exported."""
    return torch.ops.aten.lift_fresh_copy(torch.from_numpy(np.array(values, np.float32))).to(device)


def nf4_shapes(numel: int, block_size: int) -> tuple[int, int, int]:
    """Lengths of codes, absmax and (double-quantized) absmax_scale for a weight of `numel` elements."""
    blocks = -(-numel // block_size)
    return -(-numel // 2), blocks, -(-blocks // ABSMAX_BLOCK)


def unpack(codes: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The index of each element in the code book, int64 `shape`."""
    return torch.stack((codes >> 4, codes & 15), -1).flatten()[: math.prod(shape)].view(shape).long()


def pack(index: Tensor) -> Tensor:
    """Inverse of `unpack`: uint8 `[⌈n/2⌉]`; an odd last one stands beside the code of 0."""
    flat = F.pad(index.flatten(), (0, index.numel() % 2), value=CODEBOOK.index(0.0)).to(torch.uint8)
    return flat[0::2] << 4 | flat[1::2]


def chunk_of(device: torch.device) -> int:
    return CHUNK if device.type == "cpu" else CHUNK_ELSEWHERE
