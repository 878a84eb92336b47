"""The leading singular triplets of a matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SMALL = 256
"""Up to this many rows or columns the whole SVD costs next to nothing."""


class Triplets(NamedTuple):
    """M ≈ U·diag(S)·Vh."""

    U: Tensor
    """`[..., out, count]`."""
    S: Tensor
    """`[..., count]`, falling."""
    Vh: Tensor
    """`[..., count, in]`."""


def leading(
    matrix: Tensor, count: int, *, width: int, generator: torch.Generator | None = None, niter: int = 4
) -> Triplets:
    """The first `count` singular triplets of `matrix` `[..., out, in]`; exactly where it is small.

    Where it is not: the SVD within the range of (M·Mᵀ)ⁿ·M·Ω for a Gaussian Ω of `width` ≥ `count` columns and n =
    `niter` (Halko, Martinsson, Tropp 2011, arXiv 0909.4061), re-orthonormalised at each product.
    """
    *lead, rows, columns = matrix.shape
    if min(rows, columns) <= max(SMALL, width):
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        drawn = torch.randn(*lead, columns, width, dtype=matrix.dtype, device=matrix.device, generator=generator)
        Q = torch.linalg.qr(matrix @ drawn).Q
        for _ in range(niter):
            Q = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ Q).Q).Q
        inner, S, Vh = torch.linalg.svd(Q.mT @ matrix, full_matrices=False)
        U = Q @ inner
    return Triplets(U[..., :count], S[..., :count], Vh[..., :count, :])
