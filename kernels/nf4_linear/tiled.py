"""y = x·dq(W)ᵀ + b, or x·dq(W) + b, for hundreds of rows of x: W is decoded and scaled into shared memory, a tile at a
time, and is the right operand of an ordinary product.

What the tensor cores see is c·m rounded to 16 bits, c being 16 bits already. Against `skinny` it costs two instructions
more an element, and none for each row. With W stored transposed, where the maxima change along the inner elements,
it is the only way but for dequantizing all of W.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lrcompile.kernel_tools.fused import dot, rounded
from lrcompile.kernel_tools.launches import Config, Launch, config
from lrcompile.kernel_tools.parts import parts
from lrcompile.kernels.nf4_dequant.decoding import decoded_maxima
from lrcompile.kernels.nf4_linear.nibbles import table, values
from lrcompile.kernels.nf4_linear.operands import Operands
from lrcompile.kernels.nf4_linear.partial import shared

CONFIGS = {
    90: (
        config(4, 4, ROWS=16, OUTPUTS=64, DEPTH=64),
        config(4, 4, ROWS=64, OUTPUTS=64, DEPTH=64),
        config(4, 3, ROWS=64, OUTPUTS=128, DEPTH=64),
        config(8, 3, ROWS=128, OUTPUTS=128, DEPTH=64),
    ),
    80: (
        config(4, 4, ROWS=16, OUTPUTS=64, DEPTH=64),
        config(4, 3, ROWS=64, OUTPUTS=64, DEPTH=64),
        config(8, 3, ROWS=128, OUTPUTS=128, DEPTH=32),
    ),
}


@triton.jit(do_not_specialize=["rows"])
def _tiled(x, codes, planes, absmax, absmax_scale, absmax_offset, dynamic, bias, y, rows, out_features, in_features,
           BLOCK_SIZE: tl.constexpr, SPAN: tl.constexpr, TRANSPOSED: tl.constexpr,
           ROWS: tl.constexpr, OUTPUTS: tl.constexpr, DEPTH: tl.constexpr):  # fmt: skip
    across = tl.cdiv(rows, ROWS)
    n0 = tl.program_id(0) // across * OUTPUTS
    output, inner = n0 + tl.arange(0, OUTPUTS), tl.arange(0, DEPTH)
    row = tl.program_id(0) % across * ROWS + tl.arange(0, ROWS)
    word = tl.arange(0, (OUTPUTS if TRANSPOSED else DEPTH) // 8)
    words = table(planes, word[None, :])

    steps = tl.cdiv(tl.cdiv(in_features, DEPTH), tl.num_programs(1))
    first = tl.program_id(1) * steps * DEPTH
    last = tl.minimum(first + steps * DEPTH, in_features)
    x_tile = x + (tl.minimum(row, rows - 1) * in_features)[:, None] + inner[None, :]
    packed_codes = codes.to(tl.pointer_type(tl.int32))
    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    block = _places(first, n0, out_features, in_features, SPAN, TRANSPOSED, OUTPUTS, DEPTH) // (BLOCK_SIZE // SPAN)
    held = tl.load(absmax + block)
    for k in range(first, last, DEPTH):
        packed = tl.load(packed_codes + _places(k, n0, out_features, in_features, 8, TRANSPOSED, OUTPUTS, DEPTH))
        c = values(packed, words, x.dtype.element_ty).to(tl.float32)
        m = decoded_maxima(held, block, absmax_scale, absmax_offset, dynamic)[:, :, None]
        if TRANSPOSED:
            W = tl.reshape(tl.reshape(c, (DEPTH, OUTPUTS // SPAN, SPAN)) * m, (DEPTH, OUTPUTS))
        else:
            W = tl.trans(tl.reshape(tl.reshape(c, (OUTPUTS, DEPTH // SPAN, SPAN)) * m, (OUTPUTS, DEPTH)))
        W = rounded(W, x.dtype.element_ty)
        left = tl.load(x_tile + k, mask=inner[None, :] < last - k, other=0.0)
        block = _places(k + DEPTH, n0, out_features, in_features, SPAN, TRANSPOSED, OUTPUTS, DEPTH)
        block = block // (BLOCK_SIZE // SPAN)
        held = tl.load(absmax + block)
        total = dot(left, W, total, "ieee")

    if bias is not None:
        total += tl.load(bias + tl.minimum(output, out_features - 1)).to(tl.float32)[None, :]
    place = y + (tl.program_id(1) * rows + row).to(tl.int64)[:, None] * out_features + output[None, :]
    tl.store(place, total.to(y.dtype.element_ty), mask=(row[:, None] < rows) & (output[None, :] < out_features))


@triton.jit
def _places(k, n0, out_features, in_features, UNIT: tl.constexpr,
            TRANSPOSED: tl.constexpr, OUTPUTS: tl.constexpr, DEPTH: tl.constexpr):  # fmt: skip
    """Where a tile from inner element k and output n0 on lies in W as stored, in runs of UNIT elements; beyond the end
    the last ones again.
    """
    if TRANSPOSED:
        line = tl.minimum(k + tl.arange(0, DEPTH), in_features - 1)
        run = tl.minimum(n0 // UNIT + tl.arange(0, OUTPUTS // UNIT), out_features // UNIT - 1)
        return line[:, None] * (out_features // UNIT) + run[None, :]
    else:
        line = tl.minimum(n0 + tl.arange(0, OUTPUTS), out_features - 1)
        run = tl.minimum(k // UNIT + tl.arange(0, DEPTH // UNIT), in_features // UNIT - 1)
        return line[:, None] * (in_features // UNIT) + run[None, :]


def launches(operands: Operands, config: Config) -> list[Launch]:
    """Writes `operands.y`; the rows of W as it is stored are multiples of 8 long."""
    blocks = dict(config.blocks)
    outputs = triton.cdiv(operands.out_features, blocks["OUTPUTS"])
    tiles = outputs * triton.cdiv(operands.rows, blocks["ROWS"])
    split = parts(tiles, operands.in_features // blocks["DEPTH"], operands.x.device)
    span = min(operands.span, blocks["OUTPUTS" if operands.transposed else "DEPTH"])
    arguments = operands.arguments() | {"SPAN": span, "TRANSPOSED": operands.transposed}
    launch = Launch(_tiled, (tiles, split), arguments, config)
    return shared(launch, operands, split)
