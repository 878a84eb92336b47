"""`lrcompile_kernels::nf4_dequantize`: W = c[q]·m as one op that no graph compiler looks into.

It has no autograd of its own: only functions that spell their backward call it, and hand it codes, never gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from lrcompile.kernel_tools.shapes import capability, shape_class
from lrcompile.kernel_tools.tuning import Way, run_fastest
from lrcompile.kernels.nf4_dequant.checking import checked_storage
from lrcompile.kernels.nf4_dequant.reference import dequantize_nf4
from lrcompile.kernels.nf4_dequant.storage import Nf4, kept_tables

FORWARD, BACKWARD = 0, 1
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
"""What the Triton kernel writes."""

LIBRARY = torch.library.Library("lrcompile_kernels", "FRAGMENT")
LIBRARY.define(
    "nf4_dequantize(Tensor codes, Tensor absmax, Tensor? absmax_scale, Tensor? absmax_offset, int rows, int columns, "
    "int block_size, ScalarType dtype, int phase) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl(LIBRARY, "nf4_dequantize", "CompositeExplicitAutograd")
def nf4_dequantize(
    codes: Tensor, absmax: Tensor, absmax_scale: Tensor | None, absmax_offset: Tensor | None,
    rows: int, columns: int, block_size: int, dtype: torch.dtype, phase: int,
) -> Tensor:  # fmt: skip
    """W = c[q]·m  (arXiv 2305.14314), formed in float32 (float64 for float64) and rounded once to `dtype`.

    Storage as in `Nf4`; W `[rows, columns]`, contiguous. `phase`, FORWARD or BACKWARD, has no effect on the value: it
    tells the two passes of a training step apart, so that removing common subexpressions from AOTAutograd's joint graph
    does not make one tensor of both, which would then live from the forward pass to the backward. RuntimeError where
    the storage is not that of such a weight.
    """
    nf4 = checked_storage("nf4_dequantize", codes, absmax, absmax_scale, absmax_offset, rows, columns, block_size)
    return dequantize_nf4(nf4, (rows, columns), block_size, dtype, constants=kept_tables(codes.device))


@torch.library.impl(LIBRARY, "nf4_dequantize", "CUDA")
def fastest_nf4_dequantize(
    codes: Tensor, absmax: Tensor, absmax_scale: Tensor | None, absmax_offset: Tensor | None,
    rows: int, columns: int, block_size: int, dtype: torch.dtype, phase: int,
) -> Tensor:  # fmt: skip
    """The same bits."""
    stored = checked_storage("nf4_dequantize", codes, absmax, absmax_scale, absmax_offset, rows, columns, block_size)
    op = f"nf4_dequantize {block_size} {'single' if absmax_scale is None else 'double'}"
    shape = shape_class(op, dtype, rows, (columns,), (), codes.device)
    ways = partial(ways_to_dequantize, codes.device, dtype)
    return run_fastest(shape, ways, list(stored), rows, columns, block_size, dtype)


def ways_to_dequantize(device: torch.device, dtype: torch.dtype) -> Mapping[str, Way]:
    """The configurations of the kernel; plain torch, many times slower, only where there is none."""
    if capability(device) < 80 or dtype not in FLOATS:
        return {"aten": dequantized}
    from lrcompile.kernels.nf4_dequant import fused

    return {str(config): partial(fused.dequantized, config=config) for config in fused.CONFIGS}


def dequantized(
    stored: Sequence[Tensor | None], rows: int, columns: int, block_size: int, dtype: torch.dtype
) -> Tensor:
    nf4 = Nf4._make(stored)
    return dequantize_nf4(nf4, (rows, columns), block_size, dtype, constants=kept_tables(nf4.codes.device))


@torch.library.register_fake("lrcompile_kernels::nf4_dequantize", lib=LIBRARY)
def _(
    codes: Tensor, absmax: Tensor, absmax_scale: Tensor | None, absmax_offset: Tensor | None,
    rows: int, columns: int, block_size: int, dtype: torch.dtype, phase: int,
) -> Tensor:  # fmt: skip
    checked_storage("nf4_dequantize", codes, absmax, absmax_scale, absmax_offset, rows, columns, block_size)
    return codes.new_empty((rows, columns), dtype=dtype)
