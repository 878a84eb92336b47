"""n_i² = ‖W_i‖² + 2s⟨(WAᵀ)_i, B_i⟩ + s²⟨(B(AAᵀ))_i, B_i⟩ in aten, W widened a part at a time.

What is wide at any moment fits a CPU's cache, so the squares and the product are two uses of one reading.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from lrcompile.kernels.nf4_dequant.reference import decode_absmax, dequantize_nf4
from lrcompile.kernels.nf4_dequant.storage import Nf4, kept_tables

PART = 1 << 19
"""Elements of W that are wide at a time on a CPU: two megabytes of float32."""
PART_ELSEWHERE = 1 << 24


def parts_of(W: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Consecutive lines of W in `dtype`, each part with the number of its first line."""
    lines = max(1, _size(W.device) // max(W.shape[1], 1))
    for start in range(0, W.shape[0], lines):
        yield start, W[start : start + lines].to(dtype)


def parts_of_nf4(
    nf4: Nf4, lines: int, length: int, block_size: int, dtype: torch.dtype
) -> Iterator[tuple[int, Tensor]]:
    """As many lines at a time as end where a block does; the maxima, a 64th of W or less, are decoded at once."""
    whole = math.lcm(length, block_size) // length
    step = max(1, _size(nf4.codes.device) // (length * whole)) * whole
    constants = kept_tables(nf4.codes.device)
    absmax = decode_absmax(nf4, dtype, constants)
    for start in range(0, lines, step):
        count = min(step, lines - start)
        first = start * length
        part = Nf4(nf4.codes[first // 2 :], absmax[first // block_size :])
        yield start, dequantize_nf4(part, (count, length), block_size, dtype, constants=constants)


def _size(device: torch.device) -> int:
    return PART if device.type == "cpu" else PART_ELSEWHERE


def norms(
    parts: Iterator[tuple[int, Tensor]], transposed: bool, A: Tensor, B: Tensor, scale: Tensor, squares: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """n `[out]` in `dtype` from the parts of W `[out, in]`, or `[in, out]` if `transposed`; ‖W_i‖² if it is known."""
    A, B, s = A.to(dtype), B.to(dtype), scale.to(dtype)
    AW = A.new_zeros(A.shape[0], B.shape[0])
    summed = A.new_zeros(B.shape[0])
    for start, W in parts:
        held = slice(start, start + W.shape[0])
        if transposed:
            AW.addmm_(A[:, held], W)
            if squares is None:
                summed += W.square().sum(0)
        else:
            AW[:, held] = F.linear(A, W)
            if squares is None:
                summed[held] = torch.linalg.vector_norm(W, dim=1).square()
    cross = (AW.t() * B).sum(1)
    own = ((B @ (A @ A.t())) * B).sum(1)
    total = (summed if squares is None else squares.to(dtype)) + 2 * s * cross + s * s * own
    return total.clamp_min(0).sqrt()
