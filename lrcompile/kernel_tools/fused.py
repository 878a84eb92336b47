"""What kernels share inside Triton; like each `kernels/<op>/fused.py`, imported only where Triton is."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """total + a·b on the tensor cores, or, for float32 with PRECISION "ieee", on the ordinary ones."""
    if INTERPRETED:
        # Triton's interpreter holds bfloat16 as its bits and would multiply those. Products of 16-bit floats are exact
        # in float32, so this changes nothing else.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


def precision(dtype: torch.dtype) -> str:
    """As cuBLAS's would be: float32 is rounded to TF32 only where the user allowed it."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def padded(rank: int, widest: int) -> int:
    """A block that takes `rank` in one step if `widest` allows: a power of two, at least the 16 `tl.dot` asks for."""
    return min(max(triton.next_power_of_2(rank), 16), widest)
