"""y = x·dq(W)ᵀ + b for some tens to hundreds of rows of x: bound by the decoding, then by the tensor cores.

W is the left operand of Wxᵀ, straight from the registers that decoded it, so that the tensor cores' 64 rows are filled
by outputs and x may have few. As in `gemv`, the sum over a block is multiplied by the block's maximum afterwards, a
multiplication for each row of x and block: beyond a hundred rows or so `tiled`, which scales first, costs less.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lrcompile.kernel_tools.fused import dot
from lrcompile.kernel_tools.launches import Config, Launch, config
from lrcompile.kernel_tools.parts import parts
from lrcompile.kernels.nf4_dequant.decoding import decoded_maxima
from lrcompile.kernels.nf4_linear.nibbles import table, values
from lrcompile.kernels.nf4_linear.operands import Operands
from lrcompile.kernels.nf4_linear.partial import shared

CONFIGS = {
    90: (
        config(4, 4, OUTPUTS=128, ROWS=16),
        config(4, 4, OUTPUTS=128, ROWS=32),
        config(4, 4, OUTPUTS=64, ROWS=32),
        config(4, 3, OUTPUTS=128, ROWS=64),
        config(4, 4, OUTPUTS=64, ROWS=64),
        config(8, 3, OUTPUTS=64, ROWS=256),
    ),
    80: (
        config(4, 4, OUTPUTS=64, ROWS=16),
        config(4, 3, OUTPUTS=64, ROWS=32),
        config(4, 3, OUTPUTS=64, ROWS=64),
        config(8, 3, OUTPUTS=128, ROWS=64),
    ),
}


@triton.jit(do_not_specialize=["rows"])
def _skinny(x, codes, planes, absmax, absmax_scale, absmax_offset, dynamic, bias, y, rows, out_features, in_features,
            BLOCK_SIZE: tl.constexpr, SPAN: tl.constexpr, OUTPUTS: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    # Programs that run together share an output tile, whose codes are the larger part of what is read.
    across = tl.cdiv(rows, ROWS)
    output = tl.program_id(0) // across * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.program_id(0) % across * ROWS + tl.arange(0, ROWS)
    # What lies beyond the last output or row is made of the last one, and not stored.
    held_output, held_row = tl.minimum(output, out_features - 1), tl.minimum(row, rows - 1)
    word, inner = tl.arange(0, SPAN // 8), tl.arange(0, SPAN)
    words = table(planes, word[None, :])

    steps = tl.cdiv(in_features // SPAN, tl.num_programs(1))
    first = tl.program_id(1) * steps
    last = tl.minimum(first + steps, in_features // SPAN)
    tile = codes.to(tl.pointer_type(tl.int32)) + (held_output * (in_features // 8))[:, None] + word[None, :]
    x_tile = x + (held_row * in_features)[None, :] + inner[:, None]
    span = held_output * (in_features // SPAN)
    total = tl.zeros((OUTPUTS, ROWS), tl.float32)
    block = (span + tl.minimum(first, last - 1)) // (BLOCK_SIZE // SPAN)
    held = tl.load(absmax + block)
    for step in range(first, last):
        packed = tl.load(tile + step * (SPAN // 8))
        W = tl.reshape(values(packed, words, x.dtype.element_ty), (OUTPUTS, SPAN))
        xt = tl.load(x_tile + step * SPAN)
        m = decoded_maxima(held, block, absmax_scale, absmax_offset, dynamic)
        block = (span + tl.minimum(step + 1, last - 1)) // (BLOCK_SIZE // SPAN)
        held = tl.load(absmax + block)
        total += dot(W, xt, tl.zeros((OUTPUTS, ROWS), tl.float32), "ieee") * m[:, None]

    if bias is not None:
        total += tl.load(bias + held_output).to(tl.float32)[:, None]
    place = y + (tl.program_id(1) * rows + row).to(tl.int64)[None, :] * out_features + output[:, None]
    tl.store(place, total.to(y.dtype.element_ty), mask=(output[:, None] < out_features) & (row[None, :] < rows))


def launches(operands: Operands, config: Config) -> list[Launch]:
    """Writes `operands.y`; W stored `[out, in]`, in a multiple of 32."""
    blocks = dict(config.blocks)
    outputs = triton.cdiv(operands.out_features, blocks["OUTPUTS"])
    tiles = outputs * triton.cdiv(operands.rows, blocks["ROWS"])
    split = parts(tiles, operands.in_features // operands.span, operands.x.device)
    launch = Launch(_skinny, (tiles, split), operands.arguments(), config)
    return shared(launch, operands, split)
