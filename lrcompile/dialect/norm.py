"""The dialect's norms of rows: of a weight and a low-rank pair together, without the weight that they add up to.

They are constants to autograd and change only when a weight does, so that a compiler may take them out of its graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lrcompile.dialect.nf4  # noqa: F401  (registers nf4_linear)
from lrcompile.dialect import LIBRARY
from lrcompile.dialect.plain import plain
from lrcompile.kernels.dora_norm import ops as ops  # registers the ops that are called where nothing is traced
from lrcompile.kernels.nf4_dequant import Nf4, dequantize_nf4

LIBRARY.define("dora_norm(Tensor W, Tensor A, Tensor B, Tensor scale, bool transposed=False) -> Tensor")
LIBRARY.define(
    "nf4_dora_norm(Tensor codes, Tensor absmax, Tensor? absmax_scale, Tensor? absmax_offset, Tensor A, Tensor B, "
    "Tensor scale, int out_features, int in_features, int block_size, bool transposed, ScalarType dtype) -> Tensor"
)


@torch.library.impl(LIBRARY, "dora_norm", "CompositeImplicitAutograd")
def dora_norm(W: Tensor, A: Tensor, B: Tensor, scale: Tensor, transposed: bool = False) -> Tensor:
    """n_i = ‖(W + s·BA)_i‖, a constant to autograd  (arXiv 2402.09353).

    W `[out, in]`, or `[in, out]` if `transposed`; A `[rank, in]`, B `[out, rank]`, scale 0-d; n `[out]` in float32, or
    float64 for a float64 W, whatever autocast says.
    """
    W, A, B = (W.t() if transposed else W).detach(), A.detach(), B.detach()
    dtype = torch.promote_types(W.dtype, torch.float32)
    with without_autocast(W.device):
        if plain(W):  # what is traced stays in aten, which everything can be translated from
            return torch.ops.lrcompile_kernels.dora_norm(W, A, B, scale, None)
        return norms(squared_rows(W, dtype), product_of(A, W, dtype), A, B, scale)


@torch.library.impl(LIBRARY, "nf4_dora_norm", "CompositeImplicitAutograd")
def nf4_dora_norm(
    codes: Tensor, absmax: Tensor, absmax_scale: Tensor | None, absmax_offset: Tensor | None, A: Tensor, B: Tensor,
    scale: Tensor, out_features: int, in_features: int, block_size: int, transposed: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """n_i = ‖(dq(W) + s·BA)_i‖: as `dora_norm`, W held as NF4 and dequantized to `dtype`, which n has too."""
    nf4 = Nf4(codes, absmax, absmax_scale, absmax_offset)
    shape = (in_features, out_features) if transposed else (out_features, in_features)
    with without_autocast(codes.device):
        if plain(codes):
            return torch.ops.lrcompile_kernels.nf4_dora_norm(
                *nf4, A.detach(), B.detach(), scale, None, block_size, transposed, dtype
            )
        W = dequantize_nf4(nf4, shape, block_size, dtype, whole=True)
        squares = squared_rows(W.t() if transposed else W, dtype)
        AW = torch.ops.lrcompile.nf4_linear.default(
            A.detach().to(dtype), *nf4, None, out_features, in_features, block_size, transposed, dtype
        )
        return norms(squares, AW, A, B, scale)


def norms(squares: Tensor, AW: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    """n = √(‖W_i‖² + 2s⟨(WAᵀ)_i, B_i⟩ + s²⟨(B(AAᵀ))_i, B_i⟩) from ‖W_i‖² `[out]` and AWᵀ `[rank, out]`, in their
    dtype.
    """
    A, B, s = (each.detach().to(squares) for each in (A, B, scale))
    cross = (AW.t() * B).sum(1)
    own = ((B @ (A @ A.t())) * B).sum(1)
    return (squares + 2 * s * cross + s * s * own).clamp_min(0).sqrt()


BLOCK = 2**22
"""Numbers of W that are widened at a time."""


def product_of(x: Tensor, W: Tensor, dtype: torch.dtype) -> Tensor:
    """x·Wᵀ in `dtype`, W widened a few rows at a time."""
    return torch.cat([F.linear(x.to(dtype), rows) for rows in _wide_rows(W, dtype)], -1)


def squared_rows(W: Tensor, dtype: torch.dtype) -> Tensor:
    """‖W_i‖² `[out]` in `dtype`, W widened a few rows at a time."""
    return torch.cat([torch.linalg.vector_norm(rows, dim=1) for rows in _wide_rows(W, dtype)]).square()


def _wide_rows(W: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    for rows in W.split(max(1, BLOCK // W.shape[1])) if plain(W) and W.dtype != dtype else (W,):
        yield rows.to(dtype)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which products are formed in the dtype of their factors."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()
