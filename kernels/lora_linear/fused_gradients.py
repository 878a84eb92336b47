"""dSᵢ = dyᵢ·Bᵢ and dBᵢ = dyᵢᵀ·Sᵢ in Triton, for all maps i of a group in one launch, from one reading of each dyᵢ.

A program owns BLOCK_O columns of one dyᵢ and `span` of its rows. Walking down the rows, each tile of dyᵢ gives it one
block of rows of dSᵢ, from these columns alone, and adds to dBᵢ, from these rows alone, which stays in registers. Both
are parts of sums: they go to a float32 buffer, `[column blocks, rows, rank]` and `[spans, out, rank]` for each map, and
a second launch adds them up in a fixed order, so the same inputs give the same bits.

Bytes: 2·rows·out in 16 bits to read dy, and 8·rank·rows·out·(1/BLOCK_O + 1/span) to write the parts and read them
back: for rank 16 and BLOCK_O = span = 512 a quarter of the former, most of it within the L2 cache. Two products of
cuBLAS read dy twice. Both the parts and the arithmetic grow with the rank; beyond `LARGEST_RANK` two products do
better.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrcompile.kernel_tools.fused import dot, first_block, of_map, padded, precision, rounded, rows_of
from lrcompile.kernel_tools.launches import Config, Launch, config
from lrcompile.kernel_tools.shapes import aligned

MOST_MAPS = 8
"""The addresses of all maps of a launch are its arguments."""
LARGEST_RANK = 128

# Warps, stages, BLOCK_T, BLOCK_O by compute capability, bytes of an element and padded rank: what does not spill there
# (tests/test_kernel_lora_linear.py), with BLOCK_O at least twice the rank, so that the parts are never more than dy.
BLOCKS = {
    (90, 2, 16): ((4, 3, 64, 256), (8, 3, 64, 512)),
    (90, 2, 32): ((4, 3, 64, 256), (8, 2, 64, 512)),
    (90, 2, 64): ((8, 3, 64, 256),),
    (90, 2, 128): ((8, 2, 64, 256),),
    (90, 4, 16): ((8, 2, 16, 128),),
    (90, 4, 32): ((8, 2, 16, 128),),
    (80, 2, 16): ((4, 3, 64, 256), (8, 3, 32, 512)),
    (80, 2, 32): ((8, 3, 64, 256),),
    (80, 2, 64): ((8, 3, 64, 128),),
    (80, 4, 16): ((8, 2, 16, 128),),
    (80, 4, 32): ((8, 2, 16, 128),),
}
SPANS = (256, 1024)
"""Short ones give more programs, of which a GPU wants some hundreds; long ones fewer parts to add up."""
ADDING = config(4, 2, BLOCK=1024)


@triton.jit(do_not_specialize=["rows", "ends"])
def _factor_gradients(dys, Bs, Ss, parts, dS_starts, dB_starts, ends, rows, span, outs, ranks, dy_strides, B_strides,
                      S_strides, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
                      BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr):  # fmt: skip
    across, down = tl.program_id(0), tl.program_id(1)
    dy, B, S = of_map(dys, ends, across), of_map(Bs, ends, across), of_map(Ss, ends, across)
    dy_stride, S_stride = of_map(dy_strides, ends, across), of_map(S_strides, ends, across)
    out, rank = of_map(outs, ends, across), of_map(ranks, ends, across)
    block = across - first_block(ends, across)

    o, r, t = block * BLOCK_O + tl.arange(0, BLOCK_O), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_T)
    here = (o[:, None] < out) & (r[None, :] < rank)
    b = tl.load(B + o[:, None] * of_map(B_strides, ends, across) + r[None, :], mask=here, other=0.0)
    # A span's first row in 64 bits, what lies within it in 32.
    start = down.to(tl.int64) * span
    dy_tile = dy + start * dy_stride + t[:, None] * dy_stride + o[None, :]
    S_tile = S + start * S_stride + t[:, None] * S_stride + r[None, :]
    dS_tile = parts + of_map(dS_starts, ends, across) + (block.to(tl.int64) * rows + start) * rank
    dS_tile += t[:, None] * rank + r[None, :]
    dB = tl.zeros((BLOCK_O, BLOCK_R), tl.float32)
    for t0 in range(down * span, min((down + 1) * span, rows), BLOCK_T):
        within = t[:, None] < rows - t0
        ours = within & (r[None, :] < rank)
        dy_values = tl.load(dy_tile, mask=within & (o[None, :] < out), other=0.0)
        S_values = tl.load(S_tile, mask=ours, other=0.0)
        tl.store(dS_tile, dot(dy_values, b, tl.zeros((BLOCK_T, BLOCK_R), tl.float32), PRECISION), mask=ours)
        dB = dot(tl.trans(dy_values), S_values, dB, PRECISION)
        dy_tile += BLOCK_T * dy_stride
        S_tile += BLOCK_T * S_stride
        dS_tile += BLOCK_T * rank
    dB_tile = parts + of_map(dB_starts, ends, across) + down.to(tl.int64) * out * rank
    tl.store(dB_tile + o[:, None] * rank + r[None, :], dB, mask=here)


@triton.jit(do_not_specialize=["counts", "ends"])
def _add_parts(parts, sums, starts, counts, lengths, ends, BLOCK: tl.constexpr):
    across = tl.program_id(0)
    total, count, length = of_map(sums, ends, across), of_map(counts, ends, across), of_map(lengths, ends, across)
    i = (across - first_block(ends, across)).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    part = parts + of_map(starts, ends, across) + i
    value = tl.zeros((BLOCK,), tl.float32)
    for _ in range(count):
        value += tl.load(part, mask=i < length, other=0.0)
        part += length
    tl.store(total + i, rounded(value, total.dtype.element_ty), mask=i < length)


def factor_gradients(
    dys: Sequence[Tensor], Bs: Sequence[Tensor], Ss: Sequence[Tensor], *, config: Config
) -> tuple[list[Tensor], list[Tensor]]:
    """dSᵢ = dyᵢ·Bᵢ and dBᵢ = dyᵢᵀ·Sᵢ: dyᵢ `[rows, outᵢ]`, Bᵢ `[outᵢ, rankᵢ]`, Sᵢ `[rows, rankᵢ]`, rows contiguous."""
    dSs = [S.new_empty(S.shape) for S in Ss]
    dBs = [B.new_empty(B.shape) for B in Bs]
    parts = dys[0].new_empty(parts_needed(dys, Bs, config), dtype=torch.float32)
    for launch in gradient_launches(dys, Bs, Ss, dSs, dBs, parts, config):
        launch()
    return dSs, dBs


def factor_gradients_of_one(dy: Tensor, B: Tensor, S: Tensor, *, config: Config) -> tuple[Tensor, Tensor]:
    """dS = dy·B and dB = dyᵀ·S."""
    (dS,), (dB,) = factor_gradients((dy,), (B,), (S,), config=config)
    return dS, dB


def parts_needed(dys: Sequence[Tensor], Bs: Sequence[Tensor], config: Config) -> int:
    """Elements of the float32 buffer."""
    return sum(count * length for count, length in _parts(dys, Bs, config))


def _parts(dys: Sequence[Tensor], Bs: Sequence[Tensor], config: Config) -> list[tuple[int, int]]:
    """How many parts of what length for each dSᵢ, then for each dBᵢ."""
    blocks, rows = dict(config.blocks), dys[0].shape[0]
    of_dS = [(triton.cdiv(B.shape[0], blocks["BLOCK_O"]), rows * B.shape[1]) for B in Bs]
    return of_dS + [(triton.cdiv(rows, blocks["span"]), B.numel()) for B in Bs]


def gradient_launches(
    dys: Sequence[Tensor], Bs: Sequence[Tensor], Ss: Sequence[Tensor], dSs: Sequence[Tensor], dBs: Sequence[Tensor],
    parts: Tensor, config: Config,
) -> tuple[Launch, Launch]:  # fmt: skip
    """First all parts of all sums, then the sums, into dSs and dBs."""
    counted = _parts(dys, Bs, config)
    starts = tuple(accumulate((count * length for count, length in counted[:-1]), initial=0))
    ends = tuple(accumulate(count for count, _ in counted[: len(Bs)]))
    first = {
        "dys": tuple(dys), "Bs": tuple(Bs), "Ss": tuple(Ss), "parts": parts,
        "dS_starts": starts[: len(Bs)], "dB_starts": starts[len(Bs) :], "ends": ends,
        "rows": dys[0].shape[0], "outs": tuple(B.shape[0] for B in Bs), "ranks": tuple(B.shape[1] for B in Bs),
        "dy_strides": rows_of(dys), "B_strides": rows_of(Bs), "S_strides": rows_of(Ss),
        "PRECISION": precision(dys[0].dtype), "BLOCK_R": padded(max(B.shape[1] for B in Bs), LARGEST_RANK),
    }  # fmt: skip
    sum_ends = tuple(accumulate(triton.cdiv(length, dict(ADDING.blocks)["BLOCK"]) for _, length in counted))
    second = {
        "parts": parts, "sums": (*dSs, *dBs), "starts": starts, "counts": tuple(count for count, _ in counted),
        "lengths": tuple(length for _, length in counted), "ends": sum_ends,
    }  # fmt: skip
    spans = counted[-1][0]
    return (
        Launch(_factor_gradients, (ends[-1], spans), first, config),
        Launch(_add_parts, (sum_ends[-1],), second, ADDING),
    )


def configs(capability: int, dys: Sequence[Tensor], Bs: Sequence[Tensor], Ss: Sequence[Tensor]) -> tuple[Config, ...]:
    """What may be chosen for these operands: nothing where rows are not contiguous or dy's do not load in vectors."""
    rank, rows = max(B.shape[1] for B in Bs), dys[0].shape[0]
    if capability < 80 or len(dys) > MOST_MAPS or rank > LARGEST_RANK:
        return ()
    if not all(dy.stride(1) == 1 and aligned(dy) for dy in dys) or any(M.stride(1) != 1 for M in (*Bs, *Ss)):
        return ()
    known = BLOCKS.get((90 if capability >= 90 else 80, dys[0].itemsize, padded(rank, LARGEST_RANK)), ())
    return tuple(
        config(warps, stages, BLOCK_T=block_t, BLOCK_O=block_o, span=span)
        for warps, stages, block_t, block_o in known
        for span in SPANS
        if span < 2 * rows or span == SPANS[0]
    )


def ahead_of_time(capability: int) -> dict[str, Launch]:
    """Every configuration on Llama-3-8B's down map alone and on its q/k/v maps together, the ranks of which differ."""
    launches = {}
    for dtype in (torch.bfloat16, torch.float32):
        for outs, ranks in EXAMPLES:
            dys, Bs, Ss = _example(dtype, outs, ranks)
            dSs, dBs = [S.new_empty(S.shape) for S in Ss], [B.new_empty(B.shape) for B in Bs]
            for some in configs(capability, dys, Bs, Ss):
                parts = torch.empty(parts_needed(dys, Bs, some), device="meta")
                first, second = gradient_launches(dys, Bs, Ss, dSs, dBs, parts, some)
                launches[f"gradients of {outs} {ranks} {dtype} {some}"] = first
                launches[f"sums of {outs} {ranks} {dtype}"] = second
    return launches


EXAMPLES = (
    *(((4096,), (rank,)) for rank in (5, 16, 32, 64, 128)),
    *(((4096, 1024, 1024), ranks) for ranks in ((16, 8, 4), (64, 32, 32))),
)


def _example(
    dtype: torch.dtype, outs: tuple[int, ...], ranks: tuple[int, ...]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    rows = 8192
    dys = [empty(rows, out) for out in outs]
    Bs = [empty(out, rank) for out, rank in zip(outs, ranks, strict=True)]
    return dys, Bs, list(empty(rows, sum(ranks)).split(ranks, 1))
