"""y = Σᵢ xᵢ·Mᵢ + s·m + b in Triton: the narrow product s·m is added to the accumulator of the wide ones.

cuBLAS computes it as one product and one more that reads and writes y again, 4·rows·columns bytes in 16 bits. Here y is
written once and never read. What it costs is that Triton's wide product may be slower than cuBLAS's, so the tuner
decides: the fewer the inner elements, the more there is to win.

Forward: x·Wᵀ + S·Bᵀ + b. Input gradient: Σᵢ dyᵢ·Wᵢ + dS·A. The storage order of each operand is in its strides.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrcompile.kernel_tools.fused import dot, padded, precision, rounded
from lrcompile.kernel_tools.launches import Config, Launch, config
from lrcompile.kernel_tools.shapes import aligned

WIDEST = {2: 64, 4: 16}
"""Columns of a narrow product taken at a time, by bytes of an element; a smaller rank is padded to a power of two."""

# By compute capability and bytes of an element: what does not spill there (tests/test_kernel_lora_linear.py). Unless
# the user allows TF32, float32 is multiplied exactly, by the ordinary cores: small tiles.
CONFIGS = {
    (90, 2): (
        config(8, 3, BLOCK_T=128, BLOCK_N=256, BLOCK_K=64, GROUP=8),
        config(8, 4, BLOCK_T=128, BLOCK_N=128, BLOCK_K=64, GROUP=8),
        config(4, 4, BLOCK_T=64, BLOCK_N=128, BLOCK_K=64, GROUP=8),
        config(4, 5, BLOCK_T=16, BLOCK_N=64, BLOCK_K=64, GROUP=1),
    ),
    (80, 2): (
        config(8, 3, BLOCK_T=128, BLOCK_N=256, BLOCK_K=32, GROUP=8),
        config(8, 3, BLOCK_T=128, BLOCK_N=128, BLOCK_K=64, GROUP=8),
        config(4, 4, BLOCK_T=64, BLOCK_N=128, BLOCK_K=32, GROUP=8),
        config(4, 4, BLOCK_T=16, BLOCK_N=64, BLOCK_K=64, GROUP=1),
    ),
    (90, 4): (config(8, 3, BLOCK_T=128, BLOCK_N=64, BLOCK_K=16, GROUP=8),),
    (80, 4): (config(8, 3, BLOCK_T=128, BLOCK_N=64, BLOCK_K=16, GROUP=8),),
}
UNALIGNED = (config(4, 3, BLOCK_T=64, BLOCK_N=64, BLOCK_K=32, GROUP=8),)
"""For operands whose rows do not begin at multiples of 16 bytes: addresses of single elements take many registers."""


@triton.jit
def _product(total, x, x_strides, M, M_strides, t0, n0, rows, columns, inner,
             PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """total + x[t0:, :]·M[:, n0:]."""
    t, n, k = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    # The tile's origin in 64 bits, steps within it in 32: a matrix may be longer than 2³¹, a tile never.
    x_tile = x + t0.to(tl.int64) * x_strides[0] + t[:, None] * x_strides[0] + k[None, :] * x_strides[1]
    M_tile = M + n0.to(tl.int64) * M_strides[1] + k[:, None] * M_strides[0] + n[None, :] * M_strides[1]
    within_t, within_n = t[:, None] < rows - t0, n[None, :] < columns - n0
    for k0 in range(0, inner, BLOCK_K):
        left = inner - k0
        a = tl.load(x_tile, mask=within_t & (k[None, :] < left), other=0.0)
        b = tl.load(M_tile, mask=within_n & (k[:, None] < left), other=0.0)
        total = dot(a, b, total, PRECISION)
        x_tile += BLOCK_K * x_strides[1]
        M_tile += BLOCK_K * M_strides[0]
    return total


@triton.jit(do_not_specialize=["rows"])
def _sum_of_products(xs, Ms, s, m, bias, y, rows, columns, inner, rank, x_strides, M_strides, s_strides, m_strides,
                     PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                     BLOCK_R: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    # Tiles in bands of GROUP rows, down a band's columns: those that run together share more of x and M in the L2.
    tile, across = tl.program_id(0), tl.cdiv(columns, BLOCK_N)
    first = tile // (GROUP * across) * GROUP
    height = min(tl.cdiv(rows, BLOCK_T) - first, GROUP)
    t0 = (first + tile % (GROUP * across) % height) * BLOCK_T
    n0 = tile % (GROUP * across) // height * BLOCK_N

    total = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for i in tl.static_range(len(xs)):
        total = _product(total, xs[i], x_strides[i], Ms[i], M_strides[i], t0, n0, rows, columns, inner[i],
                         PRECISION, BLOCK_T, BLOCK_N, BLOCK_K)  # fmt: skip
    total = _product(total, s, s_strides, m, m_strides, t0, n0, rows, columns, rank,
                     PRECISION, BLOCK_T, BLOCK_N, BLOCK_R)  # fmt: skip

    t, n = t0 + tl.arange(0, BLOCK_T), n0 + tl.arange(0, BLOCK_N)
    if bias is not None:
        total += tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    place = y + t.to(tl.int64)[:, None] * columns + n[None, :]
    tl.store(place, rounded(total, y.dtype.element_ty), mask=(t[:, None] < rows) & (n[None, :] < columns))


def launch(xs: Sequence[Tensor], Ms: Sequence[Tensor], bias: Tensor | None, y: Tensor, config: Config) -> Launch:
    """Writes Σᵢ xᵢ·Mᵢ + b into y; the last product is the narrow one.

    xᵢ `[rows, kᵢ]`, Mᵢ `[kᵢ, columns]` with any strides, bias `[columns]`, y `[rows, columns]` contiguous; two products
    or more, all of one dtype.
    """
    *wide, s = xs
    *matrices, m = Ms
    rows, columns = y.shape
    blocks = dict(config.blocks)
    tiles = triton.cdiv(rows, blocks["BLOCK_T"]) * triton.cdiv(columns, blocks["BLOCK_N"])
    arguments = {
        "xs": tuple(wide), "Ms": tuple(matrices), "s": s, "m": m, "bias": bias, "y": y,
        "rows": rows, "columns": columns, "inner": tuple(x.shape[1] for x in wide), "rank": s.shape[1],
        "x_strides": tuple(x.stride() for x in wide), "M_strides": tuple(M.stride() for M in matrices),
        "s_strides": s.stride(), "m_strides": m.stride(),
        "PRECISION": precision(y.dtype), "BLOCK_R": padded(s.shape[1], WIDEST[s.itemsize]),
    }  # fmt: skip
    return Launch(_sum_of_products, (tiles,), arguments, config)


def sum_of_products(xs: Sequence[Tensor], Ms: Sequence[Tensor], bias: Tensor | None, *, config: Config) -> Tensor:
    y = xs[0].new_empty(xs[0].shape[0], Ms[0].shape[1])
    launch(xs, Ms, bias, y, config)()
    return y


def configs(capability: int, xs: Sequence[Tensor], Ms: Sequence[Tensor]) -> tuple[Config, ...]:
    """What may be chosen for these operands; nothing on a device older than Ampere."""
    if capability < 80:
        return ()
    if not all(aligned(operand) for operand in (*xs[:-1], *Ms[:-1])):
        return UNALIGNED
    known = CONFIGS[90 if capability >= 90 else 80, xs[0].itemsize]
    return tuple(some for some in known if dict(some.blocks)["BLOCK_T"] < 2 * max(xs[0].shape[0], 16))


def ahead_of_time(capability: int) -> dict[str, Launch]:
    """Every configuration on Llama-3-8B's k/v maps forward and backward, q/k/v backward together, and odd sizes."""
    return {
        f"{name} {dtype} {some}": launch(xs, Ms, bias, xs[0].new_empty(xs[0].shape[0], Ms[0].shape[1]), some)
        for dtype in (torch.bfloat16, torch.float32)
        for name, (xs, Ms, bias) in _examples(dtype).items()
        for some in configs(capability, xs, Ms)
    }


def _examples(dtype: torch.dtype) -> dict[str, tuple[list[Tensor], list[Tensor], Tensor | None]]:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    rows = 8192
    return {
        "forward": ([empty(rows, 4096), empty(rows, 16)], [empty(1024, 4096).t(), empty(1024, 16).t()], None),
        "forward with bias": (
            [empty(rows, 4096), empty(rows, 48)[:, 16:32]], [empty(1024, 4096).t(), empty(1024, 16).t()], empty(1024)
        ),
        "backward": ([empty(rows, 1024), empty(rows, 64)], [empty(1024, 4096), empty(64, 4096)], None),
        "group backward": (
            [empty(rows, 4096), empty(rows, 1024), empty(rows, 1024), empty(rows, 48)],
            [empty(4096, 4096), empty(1024, 4096), empty(1024, 4096), empty(48, 4096)],
            None,
        ),
        "odd": ([empty(7, 13), empty(7, 5)], [empty(17, 13).t(), empty(17, 5).t()], empty(17)),
    }  # fmt: skip
