"""y = x·dq(W)ᵀ + b for up to 16 rows of x: bound by the reading of the codes.

A program makes 16 outputs, each of its warps a slice of the inner elements; the slices are added at the end. The values
of the code book go to the tensor cores as they come out of the codes, and the sum over a block is multiplied by the
block's maximum afterwards: y = Σ_blocks m·Σ_k c[q_k]·x_k, a multiplication a block instead of one an element.

Which elements of a block meet in one instruction of the tensor cores does not matter as long as W and x agree. They are
taken in the order that leaves the values in the thread which decoded them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lrcompile.kernel_tools.fused import dot
from lrcompile.kernel_tools.launches import Config, Launch, config
from lrcompile.kernels.nf4_dequant.decoding import decoded_maxima
from lrcompile.kernels.nf4_linear.nibbles import halves, pairs, table, values, values_partly_looked_up
from lrcompile.kernels.nf4_linear.operands import Operands

MOST_ROWS = 16
CONFIGS = (
    config(8, 1, SLICES=8, OUTPUTS=32, LOOK_UP=1),
    config(4, 1, SLICES=4, OUTPUTS=32, LOOK_UP=1),
    config(8, 1, SLICES=8, OUTPUTS=32, LOOK_UP=0),
    config(8, 1, SLICES=8, OUTPUTS=16, LOOK_UP=0),
    config(16, 1, SLICES=16, OUTPUTS=16, LOOK_UP=0),
)
"""As many slices as warps: then no warp needs what another one decoded."""


@triton.jit
def _gemv(x, codes, planes, pairs, absmax, absmax_scale, absmax_offset, dynamic, bias, y,
          rows, out_features, in_features,
          BLOCK_SIZE: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, SLICES: tl.constexpr,
          OUTPUTS: tl.constexpr, LOOK_UP: tl.constexpr):  # fmt: skip
    EIGHTHS: tl.constexpr = OUTPUTS // 8
    STEP: tl.constexpr = SLICES * SPAN
    first = tl.program_id(0) * OUTPUTS
    part, start = tl.arange(0, SLICES), tl.arange(0, SLICES) * SPAN
    word = tl.arange(0, SPAN // 8)
    words, looked_up = table(planes, word[None, None, :]), tl.load(pairs + tl.arange(0, 256))
    # Outputs beyond the last one are made of the last one's codes, and not stored; rows likewise.
    tile = codes.to(tl.pointer_type(tl.int32)) + (start // 8)[:, None, None] + word[None, None, :]
    length = in_features // 8
    at = (_eight(first, out_features, length), _eight(first + 8, out_features, length),
          _eight(first + 16, out_features, length), _eight(first + 24, out_features, length))  # fmt: skip
    # Pairs of 16-bit values as words: what is kept for the next step stays packed.
    row = tl.arange(0, ROWS)
    inputs_tile = x.to(tl.pointer_type(tl.int32)) + tl.minimum(row, rows - 1)[None, :, None] * (in_features // 2)
    inputs_tile += (start // 2)[:, None, None] + tl.arange(0, SPAN // 2)[None, None, :]
    span = tl.minimum(first + tl.arange(0, OUTPUTS), out_features - 1)[None, :] * (in_features // SPAN)

    total = tl.zeros((SLICES, OUTPUTS, ROWS), tl.float32)
    within = (start < in_features)[:, None, None]
    packed = _eighths(tile, at, within, EIGHTHS)
    inputs = tl.load(inputs_tile, mask=within, other=0)
    block = (span + tl.minimum(part, in_features // SPAN - 1)[:, None]) // (BLOCK_SIZE // SPAN)
    held = tl.load(absmax + block)
    for k in range(STEP, in_features + STEP, STEP):
        if LOOK_UP:
            W = values_partly_looked_up(packed, words, looked_up, x.dtype.element_ty)
        else:
            W = values(packed, words, x.dtype.element_ty)
        W = tl.permute(tl.reshape(W, (SLICES, OUTPUTS, 4, SPAN // 16, 4)), (0, 1, 3, 2, 4))
        W = tl.reshape(W, (SLICES, OUTPUTS, SPAN))
        xt = tl.reshape(halves(inputs, x.dtype.element_ty), (SLICES, ROWS, 4, SPAN // 16, 4))
        xt = tl.reshape(tl.permute(xt, (0, 3, 2, 4, 1)), (SLICES, SPAN, ROWS))
        m = decoded_maxima(held, block, absmax_scale, absmax_offset, dynamic)
        # What the next step needs is asked for before this one's arithmetic.
        tile += STEP // 8
        inputs_tile += STEP // 2
        within = (start < in_features - k)[:, None, None]
        packed = _eighths(tile, at, within, EIGHTHS)
        inputs = tl.load(inputs_tile, mask=within, other=0)
        block = (span + tl.minimum(part + k // SPAN, in_features // SPAN - 1)[:, None]) // (BLOCK_SIZE // SPAN)
        held = tl.load(absmax + block)
        total += dot(W, xt, tl.zeros((SLICES, OUTPUTS, ROWS), tl.float32), "ieee") * m[:, :, None]

    result = tl.sum(total, 0)
    column = first + tl.arange(0, OUTPUTS)
    if bias is not None:
        result += tl.load(bias + tl.minimum(column, out_features - 1)).to(tl.float32)[:, None]
    place = y + row[None, :] * out_features + column[:, None]
    tl.store(place, result.to(y.dtype.element_ty), mask=(column[:, None] < out_features) & (row[None, :] < rows))


@triton.jit
def _eight(first, out_features, length):
    """Where the rows of eight outputs begin."""
    return tl.minimum(first + tl.arange(0, 8), out_features - 1)[None, :, None] * length


@triton.jit
def _eighths(tile, at, within, EIGHTHS: tl.constexpr):
    """Words of 8·EIGHTHS outputs `[slices, outputs, words]`, every eighth in the threads that loaded it."""
    if EIGHTHS == 2:
        both = tl.join(tl.load(tile + at[0], mask=within), tl.load(tile + at[1], mask=within))
    else:
        even = tl.join(tl.load(tile + at[0], mask=within), tl.load(tile + at[2], mask=within))
        both = tl.join(even, tl.join(tl.load(tile + at[1], mask=within), tl.load(tile + at[3], mask=within)))
        both = tl.reshape(both, (both.shape[0], 8, both.shape[2], 4))
    return tl.reshape(tl.permute(both, (0, 3, 1, 2)), (both.shape[0], 8 * EIGHTHS, both.shape[2]))


def launches(operands: Operands, config: Config) -> list[Launch]:
    """Writes `operands.y`; up to 16 rows, W stored `[out, in]`, in a multiple of 32."""
    table_of_bytes = pairs(operands.x.dtype, operands.x.device)
    arguments = operands.arguments() | {"pairs": table_of_bytes, "ROWS": 8 if operands.rows <= 8 else 16}
    return [Launch(_gemv, (triton.cdiv(operands.out_features, dict(config.blocks)["OUTPUTS"]),), arguments, config)]
