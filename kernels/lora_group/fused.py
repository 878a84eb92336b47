"""yᵢ += Sᵢ·Bᵢᵀ in Triton, in place and for all maps i of a group in one launch.

cuBLAS has left the wide products in yᵢ. One more product each would read and write the same bytes, so what is saved is
launches. Where the narrow product is better added before yᵢ is written at all, `lora_linear` does that.
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

MOST_MAPS = 8
"""The addresses of all maps of a launch are its arguments."""
WIDEST = 64
"""Columns of S taken at a time."""
# By bytes of an element: what does not spill (tests/test_kernel_lora_group.py).
CONFIGS = {
    2: (config(4, 2, BLOCK_T=64, BLOCK_O=64), config(8, 2, BLOCK_T=64, BLOCK_O=128)),
    4: (config(8, 2, BLOCK_T=32, BLOCK_O=64),),
}


@triton.jit(do_not_specialize=["rows", "ends"])
def _expand(ys, Ss, Bs, ends, rows, outs, ranks, S_strides, B_strides, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
            BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr):  # fmt: skip
    across, down = tl.program_id(0), tl.program_id(1)
    y, S, B = of_map(ys, ends, across), of_map(Ss, ends, across), of_map(Bs, ends, across)
    out, rank = of_map(outs, ends, across), of_map(ranks, ends, across)
    t, r = down * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_R)
    o = (across - first_block(ends, across)) * BLOCK_O + tl.arange(0, BLOCK_O)
    S_tile = S + t.to(tl.int64)[:, None] * of_map(S_strides, ends, across) + r[None, :]
    B_tile = B + o.to(tl.int64)[None, :] * of_map(B_strides, ends, across) + r[:, None]
    y_tile = y + t.to(tl.int64)[:, None] * out + o[None, :]
    here = (t[:, None] < rows) & (o[None, :] < out)
    total = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    for r0 in range(0, rank, BLOCK_R):
        S_values = tl.load(S_tile, mask=(t[:, None] < rows) & (r[None, :] < rank - r0), other=0.0)
        B_values = tl.load(B_tile, mask=(o[None, :] < out) & (r[:, None] < rank - r0), other=0.0)
        total = dot(S_values, B_values, total, PRECISION)
        S_tile += BLOCK_R
        B_tile += BLOCK_R
    total += tl.load(y_tile, mask=here, other=0.0).to(tl.float32)
    tl.store(y_tile, rounded(total, y.dtype.element_ty), mask=here)


def group_products(
    x: Tensor,
    Ws: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    Ss: Sequence[Tensor],
    Bs: Sequence[Tensor],
    *,
    config: Config,
) -> list[Tensor]:
    """yᵢ = x·Wᵢᵀ + bᵢ + Sᵢ·Bᵢᵀ, the wide products by cuBLAS; Sᵢ and Bᵢ of contiguous rows."""
    ys = [torch.nn.functional.linear(x, W, bias) for W, bias in zip(Ws, biases, strict=True)]
    expand(ys, Ss, Bs, config)()
    return ys


def configs(capability: int, dtype: torch.dtype, maps: int) -> tuple[Config, ...]:
    """What may be chosen; nothing on a device older than Ampere, or for more maps than a launch has arguments for."""
    return CONFIGS[dtype.itemsize] if capability >= 80 and maps <= MOST_MAPS else ()


def expand(ys: Sequence[Tensor], Ss: Sequence[Tensor], Bs: Sequence[Tensor], config: Config) -> Launch:
    """yᵢ += Sᵢ·Bᵢᵀ: yᵢ `[rows, outᵢ]` contiguous, Sᵢ `[rows, rankᵢ]` and Bᵢ `[outᵢ, rankᵢ]` of contiguous rows."""
    blocks, rows = dict(config.blocks), ys[0].shape[0]
    ends = tuple(accumulate(triton.cdiv(B.shape[0], blocks["BLOCK_O"]) for B in Bs))
    arguments = {
        "ys": tuple(ys), "Ss": tuple(Ss), "Bs": tuple(Bs), "ends": ends,
        "rows": rows, "outs": tuple(B.shape[0] for B in Bs), "ranks": tuple(B.shape[1] for B in Bs),
        "S_strides": rows_of(Ss), "B_strides": rows_of(Bs),
        "PRECISION": precision(ys[0].dtype), "BLOCK_R": padded(max(B.shape[1] for B in Bs), WIDEST),
    }  # fmt: skip
    return Launch(_expand, (ends[-1], triton.cdiv(rows, blocks["BLOCK_T"])), arguments, config)


def ahead_of_time(capability: int) -> dict[str, Launch]:
    """Every configuration on Llama-3-8B's q/k/v maps, the ranks of which differ, and on odd ones."""
    launches: dict[str, Launch] = {}
    for dtype in (torch.bfloat16, torch.float32):
        for outs, ranks in (((4096, 1024, 1024), (64, 16, 8)), ((4096, 1024, 1024), (256, 16, 16)), ((17, 9), (5, 3))):
            ys = [torch.empty(8192, out, dtype=dtype, device="meta") for out in outs]
            Bs = [y.new_empty(y.shape[1], rank) for y, rank in zip(ys, ranks, strict=True)]
            Ss = list(ys[0].new_empty(8192, sum(ranks)).split(ranks, 1))
            launches |= {
                f"{outs} {ranks} {dtype} {some}": expand(ys, Ss, Bs, some)
                for some in configs(capability, dtype, len(ys))
            }
    return launches
