"""What kernels share inside Triton; like each `kernels/<op>/fused.py`, imported only where Triton is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """total + a·b on the tensor cores, or, for float32 with PRECISION "ieee", on the ordinary ones."""
    if INTERPRETED:
        # Triton's interpreter holds bfloat16 as its bits and would multiply those. Products of 16-bit floats are exact
        # in float32, so this changes nothing else.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def rounded(value, DTYPE: tl.constexpr):
    """A float32 value as the nearest of DTYPE, ties to even."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        # Triton's interpreter would cut the last bits off. The same in integers, one bit pattern being next to another:
        bits = value.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(DTYPE)


@triton.jit
def of_map(values, ends, block):
    """values[i] of the map i of a group that `block` belongs to; ends[i] is one more than the last block of map i."""
    value = values[0]
    for i in tl.static_range(1, len(values)):
        value = tl.where(block >= ends[i - 1], values[i], value)
    return value


@triton.jit
def first_block(ends, block):
    """The first block of the map that `block` belongs to."""
    first = 0
    for i in tl.static_range(1, len(ends)):
        first = tl.where(block >= ends[i - 1], ends[i - 1], first)
    return first


def precision(dtype: torch.dtype) -> str:
    """As cuBLAS's would be: float32 is rounded to TF32 only where the user allowed it."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def padded(rank: int, widest: int) -> int:
    """A block that takes `rank` in one step if `widest` allows: a power of two, at least the 16 `tl.dot` asks for."""
    return min(max(triton.next_power_of_2(rank), 16), widest)


def rows_of(matrices: Sequence[Tensor]) -> tuple[int, ...]:
    """How far apart the rows of each lie."""
    return tuple(matrix.stride(0) for matrix in matrices)
