"""W = c[q]·m in Triton: one pass, 0.5 bytes an element read and 2 or 4 written.

A thread takes four bytes of codes and writes the eight values they hold, so that neighbouring threads read and write
neighbouring memory. The sixteen values of the code book stay in the L1 cache, from where a warp's 32 different ones
come at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrcompile.kernel_tools.fused import rounded
from lrcompile.kernel_tools.launches import Config, Launch, config
from lrcompile.kernels.nf4_dequant.decoding import block_maxima, codebook, dynamic, word_aligned
from lrcompile.kernels.nf4_dequant.ops import FLOATS
from lrcompile.kernels.nf4_dequant.storage import Nf4, nf4_shapes

CONFIGS = (config(4, 1, WORDS=128, REPEAT=4), config(4, 1, WORDS=128, REPEAT=8), config(8, 1, WORDS=256, REPEAT=4))


@triton.jit
def _dequantize(codes, absmax, absmax_scale, absmax_offset, codebook, dynamic, weight, numel,
                BLOCK_SIZE: tl.constexpr, WORDS: tl.constexpr, REPEAT: tl.constexpr):  # fmt: skip
    word, within = tl.arange(0, WORDS), tl.arange(0, 8)
    shift = 4 * (within ^ 1)  # the first of a byte's two elements is its high nibble
    start = tl.program_id(0).to(tl.int64) * (WORDS * REPEAT * 8)
    if start + WORDS * REPEAT * 8 <= numel:
        for _ in tl.static_range(REPEAT):
            packed = tl.load((codes + start // 2).to(tl.pointer_type(tl.int32)) + word)
            m = block_maxima((start + 8 * word) // BLOCK_SIZE, absmax, absmax_scale, absmax_offset, dynamic)
            c = tl.load(codebook + ((packed[:, None] >> shift[None, :]) & 15))
            place = weight + start + 8 * word[:, None] + within[None, :]
            tl.store(place, rounded(c * m[:, None], weight.dtype.element_ty))
            start += WORDS * 8
    else:
        for _ in range(REPEAT):  # the last program, by single elements: a word may reach beyond the end of the codes
            element = start + 8 * word[:, None] + within[None, :]
            nearest = tl.minimum(element, numel - 1)
            q = (tl.load(codes + nearest // 2).to(tl.int32) >> (shift & 4)[None, :]) & 15
            m = block_maxima(nearest // BLOCK_SIZE, absmax, absmax_scale, absmax_offset, dynamic)
            tl.store(
                weight + element, rounded(tl.load(codebook + q) * m, weight.dtype.element_ty), mask=element < numel
            )
            start += WORDS * 8


def launch(nf4: Nf4, block_size: int, weight: Tensor, config: Config) -> Launch:
    """Writes dq(W) into `weight`, contiguous, of any shape and a dtype of `FLOATS`."""
    blocks, device = dict(config.blocks), weight.device
    arguments = {
        "codes": word_aligned(nf4.codes), "absmax": nf4.absmax,
        "absmax_scale": nf4.absmax_scale, "absmax_offset": nf4.absmax_offset,
        "codebook": codebook(device), "dynamic": dynamic(device), "weight": weight, "numel": weight.numel(),
        "BLOCK_SIZE": block_size,
    }  # fmt: skip
    grid = (triton.cdiv(weight.numel(), 8 * blocks["WORDS"] * blocks["REPEAT"]),)
    # A multiplication and an addition fused into one would round the maxima otherwise than the reference does.
    return Launch(_dequantize, grid, arguments, config, fuse_multiply_add=False)


def dequantized(
    stored: Sequence[Tensor | None], rows: int, columns: int, block_size: int, dtype: torch.dtype, *, config: Config
) -> Tensor:
    """dq(W) `[rows, columns]` in one configuration."""
    nf4 = Nf4._make(stored)
    weight = nf4.codes.new_empty((rows, columns), dtype=dtype)
    launch(nf4, block_size, weight, config)()
    return weight


def ahead_of_time(capability: int) -> dict[str, Launch]:
    """Every configuration on one weight of Llama-3-8B and one of odd size, stored either way, for every dtype."""
    return {
        f"{rows}x{columns} {'double' if double else 'single'} {dtype} {some}": launch(
            _stored(rows * columns, double), 64, torch.empty(rows, columns, dtype=dtype, device="meta"), some
        )
        for rows, columns in ((14336, 4096), (1021, 333))
        for double in (False, True)
        for dtype in FLOATS
        for some in CONFIGS
    }


def _stored(numel: int, double: bool) -> Nf4:
    codes, blocks, scales = nf4_shapes(numel, 64)
    packed = torch.empty(codes, dtype=torch.uint8, device="meta")
    if not double:
        return Nf4(packed, torch.empty(blocks, device="meta"))
    absmax = torch.empty(blocks, dtype=torch.uint8, device="meta")
    return Nf4(packed, absmax, torch.empty(scales, device="meta"), torch.empty((), device="meta"))
