"""y = x·M + s·m + b in Triton for Hopper: tiles fetched by its copy engine, programs that stay for many tiles.

As `fused`, for one wide product. A tile of x or M is one instruction of one thread (TMA, through a descriptor of the
whole matrix that the host fills in) instead of addresses and masks in every thread; beyond the edges it reads zeros. As
many programs run as the GPU has multiprocessors, and each takes tile after tile: `flatten` lets the compiler fetch the
next tile's first blocks while this one's last are multiplied. That wants one loop inside the loop over tiles, so the
narrow product, of at most `LARGEST_RANK`, goes first and in one step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lrcompile.kernel_tools.fused import dot, padded, precision, rounded
from lrcompile.kernel_tools.launches import Config, Launch, config
from lrcompile.kernel_tools.shapes import aligned, processors

LARGEST_RANK = 64
# What does not spill and fits sm_90's shared memory, the first up to rank 16 only (tests/test_kernel_lora_linear.py).
CONFIGS = (
    config(8, 4, BLOCK_T=128, BLOCK_N=256, BLOCK_K=64, GROUP=8),
    config(8, 3, BLOCK_T=128, BLOCK_N=256, BLOCK_K=64, GROUP=8),
    config(8, 4, BLOCK_T=128, BLOCK_N=128, BLOCK_K=64, GROUP=8),
)


@triton.jit(do_not_specialize=["rows"])
def _sum_of_two(x, M, s, m, bias, y, rows, columns, inner, rank, s_strides, m_strides, TURNED: tl.constexpr,
                PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                BLOCK_R: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    across, down = tl.cdiv(columns, BLOCK_N), tl.cdiv(rows, BLOCK_T)
    for tile in tl.range(tl.program_id(0), across * down, tl.num_programs(0), flatten=True):
        # In bands of GROUP rows, as in `fused`.
        first = tile // (GROUP * across) * GROUP
        height = min(down - first, GROUP)
        t0 = (first + tile % (GROUP * across) % height) * BLOCK_T
        n0 = tile % (GROUP * across) // height * BLOCK_N
        t, n, r = t0 + tl.arange(0, BLOCK_T), n0 + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
        within_t, within_n = t[:, None] < rows, n[None, :] < columns

        s_tile = s + t.to(tl.int64)[:, None] * s_strides[0] + r[None, :] * s_strides[1]
        m_tile = m + n.to(tl.int64)[None, :] * m_strides[1] + r[:, None] * m_strides[0]
        narrow = tl.load(s_tile, mask=within_t & (r[None, :] < rank), other=0.0)
        matrix = tl.load(m_tile, mask=within_n & (r[:, None] < rank), other=0.0)
        total = dot(narrow, matrix, tl.zeros((BLOCK_T, BLOCK_N), tl.float32), PRECISION)
        for k0 in range(0, inner, BLOCK_K):
            b = M.load([n0, k0]).T if TURNED else M.load([k0, n0])
            total = dot(x.load([t0, k0]), b, total, PRECISION)
        if bias is not None:
            total += tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
        place = y + t.to(tl.int64)[:, None] * columns + n[None, :]
        tl.store(place, rounded(total, y.dtype.element_ty), mask=within_t & within_n)


def launch(xs: Sequence[Tensor], Ms: Sequence[Tensor], bias: Tensor | None, y: Tensor, config: Config) -> Launch:
    """Writes x·M + s·m + b into y: xs = (x, s) and Ms = (M, m) such that `configs` offers something for them.

    x `[rows, k]`, M `[k, columns]`, s `[rows, rank]`, m `[rank, columns]`, bias `[columns]`, y `[rows, columns]`.
    """
    (x, s), (M, m) = xs, Ms
    rows, columns = y.shape
    blocks = dict(config.blocks)
    tiles = triton.cdiv(rows, blocks["BLOCK_T"]) * triton.cdiv(columns, blocks["BLOCK_N"])
    turned = M.stride(1) != 1
    arguments = {
        "x": _described(x, blocks["BLOCK_T"], blocks["BLOCK_K"]),
        "M": _described(M.t(), blocks["BLOCK_N"], blocks["BLOCK_K"]) if turned
        else _described(M, blocks["BLOCK_K"], blocks["BLOCK_N"]),
        "s": s, "m": m, "bias": bias, "y": y, "rows": rows, "columns": columns, "inner": x.shape[1],
        "rank": s.shape[1], "s_strides": s.stride(), "m_strides": m.stride(),
        "TURNED": turned, "PRECISION": precision(y.dtype), "BLOCK_R": padded(s.shape[1], LARGEST_RANK),
    }  # fmt: skip
    return Launch(_sum_of_two, (min(tiles, processors(y.device)),), arguments, config)


def _described(matrix: Tensor, height: int, width: int) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [height, width])


def sum_of_products(xs: Sequence[Tensor], Ms: Sequence[Tensor], bias: Tensor | None, *, config: Config) -> Tensor:
    y = xs[0].new_empty(xs[0].shape[0], Ms[0].shape[1])
    launch(xs, Ms, bias, y, config)()
    return y


def configs(capability: int, xs: Sequence[Tensor], Ms: Sequence[Tensor]) -> tuple[Config, ...]:
    """What may be chosen for these operands: in 16 bits, on Hopper only, for one wide product that loads in vectors."""
    x, rank = xs[0], xs[-1].shape[1]
    if capability // 10 != 9 or len(xs) != 2 or x.itemsize != 2 or rank > LARGEST_RANK or x.shape[0] <= 64:
        return ()
    if not (aligned(x) and aligned(Ms[0]) and x.stride(1) == 1):
        return ()
    return CONFIGS if rank <= 16 else CONFIGS[1:]


def ahead_of_time(capability: int) -> dict[str, Launch]:
    """Every configuration on Llama-3-8B's k/v maps forward and backward, at the smallest and the largest rank."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    x, y, narrow = empty(8192, 4096), empty(8192, 1024), {rank: empty(8192, rank) for rank in (5, 16, LARGEST_RANK)}
    W = empty(1024, 4096)
    return {
        f"{name} rank {rank} {some}": launch((wide, s), (M, empty(M.shape[1], rank).t()), bias, out, some)
        for rank, s in narrow.items()
        for name, wide, M, bias, out in (("forward", x, W.t(), empty(1024), y), ("backward", y, W, None, x))
        for some in configs(capability, (wide, s), (M, empty(M.shape[1], rank).t()))
    }
