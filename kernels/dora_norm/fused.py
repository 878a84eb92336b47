"""n_i² = ‖W_i‖² + 2s⟨(WAᵀ)_i, B_i⟩ + s²⟨(B(AAᵀ))_i, B_i⟩ in Triton: one reading of W, nothing written but n.

The product goes through the tensor cores at float32's precision, each factor as the sum of two TF32 numbers, of which a
16-bit weight needs but one; B(AAᵀ), which is small, comes from aten. NF4 weights are decoded element by element, which
costs more instructions than a product's kernels would spend, but in float32 as the definition does, and once per
optimizer step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrcompile.kernel_tools.fused import dot, padded
from lrcompile.kernel_tools.launches import Config, Launch, config
from lrcompile.kernel_tools.parts import parts
from lrcompile.kernels.nf4_dequant.decoding import block_maxima, codebook, dynamic
from lrcompile.kernels.nf4_dequant.storage import Nf4, nf4_shapes

WIDEST, NF4_WIDEST = 64, 32
"""Columns of WAᵀ made at a time; for larger ranks W is read again for as many more."""
CONFIGS = (
    config(4, 4, BLOCK_O=64, BLOCK_I=32),
    config(4, 6, BLOCK_O=64, BLOCK_I=32),
    config(8, 4, BLOCK_O=128, BLOCK_I=32),
)
NF4_CONFIGS = (config(4, 1, BLOCK_O=64, BLOCK_I=32), config(8, 1, BLOCK_O=128, BLOCK_I=32))
"""One stage: Triton would copy the code book's values to shared memory one by one to have them earlier."""
FINISH = config(4, 1, BLOCK_O=32)


@triton.jit
def _norms(W, absmax, absmax_scale, absmax_offset, codebook, dynamic, A, B, scale, partial,
           out_features, in_features, rank, stride_o, stride_i, BLOCK_SIZE: tl.constexpr, SQUARES: tl.constexpr,
           BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr):  # fmt: skip
    o, i = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O), tl.arange(0, BLOCK_I)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    within_o, within_r = o < out_features, r < rank
    steps = tl.cdiv(tl.cdiv(in_features, BLOCK_I), tl.num_programs(1))
    first = tl.program_id(1) * steps * BLOCK_I
    last = tl.minimum(first + steps * BLOCK_I, in_features)
    element = (o.to(tl.int64) * stride_o)[:, None] + (first.to(tl.int64) + i)[None, :] * stride_i
    A_tile = A + first + i[:, None] + (r * in_features)[None, :]
    cross, total = tl.zeros((BLOCK_O, BLOCK_R), tl.float32), tl.zeros((BLOCK_O,), tl.float32)
    for i0 in range(first, last, BLOCK_I):
        within_i = i < last - i0
        within = within_o[:, None] & within_i[None, :]
        if BLOCK_SIZE:
            at = tl.where(within, element, 0)
            q = tl.load(W + at // 2).to(tl.int32) >> (4 - 4 * (at & 1)).to(tl.int32) & 15
            m = block_maxima(at // BLOCK_SIZE, absmax, absmax_scale, absmax_offset, dynamic)
            w = tl.where(within, tl.load(codebook + q) * m, 0.0)
        else:
            w = tl.load(W + element, mask=within, other=0.0).to(tl.float32)
        a = tl.load(A_tile, mask=within_i[:, None] & within_r[None, :], other=0.0)
        cross = dot(w, a, cross, "tf32x3")
        if SQUARES:
            total += tl.sum(w * w, 1)
        element += BLOCK_I * stride_i
        A_tile += BLOCK_I

    b = tl.load(B + (o * rank)[:, None] + r[None, :], mask=within_o[:, None] & within_r[None, :], other=0.0)
    total = tl.where(tl.program_id(2) == 0, total, 0.0) + 2 * tl.load(scale) * tl.sum(cross * b, 1)
    part = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    tl.store(partial + part * out_features + o, total, mask=within_o)


@triton.jit(do_not_specialize=["parts"])
def _finish(partial, squares, B, own, scale, n, out_features, rank, parts,
            BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr):  # fmt: skip
    o, r = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O), tl.arange(0, BLOCK_R)
    within_o = o < out_features
    total, s = tl.zeros((BLOCK_O,), tl.float32), tl.load(scale)
    for r0 in range(0, rank, BLOCK_R):
        at, within = (o * rank)[:, None] + (r0 + r)[None, :], within_o[:, None] & (r < rank - r0)[None, :]
        both = tl.load(B + at, mask=within, other=0.0) * tl.load(own + at, mask=within, other=0.0)
        total += s * s * tl.sum(both, 1)
    if squares is not None:
        total += tl.load(squares + o, mask=within_o, other=0.0)
    for part in range(parts):
        total += tl.load(partial + part * out_features + o, mask=within_o, other=0.0)
    tl.store(n + o, tl.sqrt_rn(tl.maximum(total, 0.0)), mask=within_o)


def launches(
    W: Tensor | Nf4, block_size: int, transposed: bool, A: Tensor, B: Tensor, scale: Tensor, squares: Tensor | None,
    n: Tensor, config: Config,
) -> list[Launch]:  # fmt: skip
    """Write ‖(W + s·BA)_i‖ into n `[out]`, float32.

    W `[out, in]` of 16 or 32 bits with any strides; or codes in blocks of `block_size` (else 0), stored `[in, out]` if
    `transposed`. A `[rank, in]`, B `[out, rank]`, scale 0-d, squares ‖W_i‖² `[out]` where they are known.
    """
    blocks = dict(config.blocks)
    A, B, s = A.float().contiguous(), B.float().contiguous(), scale.float()
    (rank, in_features), out_features = A.shape, B.shape[0]
    strides: tuple[int, ...]
    if isinstance(W, Nf4):
        strides, (values, maxima, second, offset) = (1, out_features) if transposed else (in_features, 1), W
    else:
        strides, (values, maxima, second, offset) = W.stride(), (W, None, None, None)
    widest = NF4_WIDEST if isinstance(W, Nf4) else WIDEST
    tiles = triton.cdiv(out_features, blocks["BLOCK_O"])
    split = parts(tiles, in_features // blocks["BLOCK_I"], n.device)
    chunks = triton.cdiv(rank, widest)
    partial = torch.empty(chunks * split, out_features, device=n.device)
    shared = {
        "B": B, "scale": s, "partial": partial, "out_features": out_features, "rank": rank,
        "BLOCK_R": padded(rank, widest),
    }  # fmt: skip
    arguments = {
        "W": values, "absmax": maxima, "absmax_scale": second, "absmax_offset": offset,
        "codebook": codebook(n.device), "dynamic": dynamic(n.device), "A": A, "in_features": in_features,
        "stride_o": strides[0], "stride_i": strides[1], "BLOCK_SIZE": block_size, "SQUARES": squares is None,
    }  # fmt: skip
    last = {"squares": squares, "own": B @ (A @ A.t()), "n": n, "parts": chunks * split}
    return [
        Launch(_norms, (tiles, split, chunks), shared | arguments, config),
        Launch(_finish, (triton.cdiv(out_features, dict(FINISH.blocks)["BLOCK_O"]),), shared | last, FINISH),
    ]


def norms(
    W: Tensor | Sequence[Tensor | None], A: Tensor, B: Tensor, scale: Tensor, squares: Tensor | None,
    block_size: int, transposed: bool, dtype: torch.dtype, *, config: Config,
) -> Tensor:  # fmt: skip
    """n `[out]` in `dtype`, float32, by one configuration; `W` a matrix, or the tensors of an `Nf4`."""
    n = torch.empty(B.shape[0], dtype=dtype, device=B.device)
    held = W if isinstance(W, Tensor) else Nf4._make(W)
    for launch in launches(held, block_size, transposed, A, B, scale, squares, n, config):
        launch()
    return n


def configs(W: Tensor | Sequence[Tensor | None]) -> tuple[Config, ...]:
    return CONFIGS if isinstance(W, Tensor) else NF4_CONFIGS


def ahead_of_time(capability: int) -> dict[str, Launch]:
    """Every configuration on a map of Llama-3-8B in either storage order, as NF4, with squares known, and odd sizes."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    found = {}
    for out, inner, rank in ((4096, 14336, 16), (1021, 333, 5), (4096, 4096, 256)):
        A, B, n, codes = empty(rank, inner), empty(out, rank), empty(out), nf4_shapes(out * inner, 64)
        double = Nf4(empty(codes[0], dtype=torch.uint8), empty(codes[1], dtype=torch.uint8), empty(codes[2]), empty())
        weights: dict[str, tuple[Tensor | Nf4, int, Tensor | None]] = {
            "bfloat16": (empty(out, inner, dtype=torch.bfloat16), 0, None),
            "float16 transposed": (empty(inner, out, dtype=torch.float16).t(), 0, n),
            "float32": (empty(out, inner), 0, None),
            "nf4": (double, 64, None),
        }
        for name, (W, block_size, squares) in weights.items():
            for some in configs(W):
                first, finish = launches(W, block_size, False, A, B, empty(), squares, n, some)
                found[f"{out}x{inner} rank {rank} {name} {some}"] = first
                found[f"finish {out}x{inner} rank {rank} {squares is None}"] = finish
    return found
