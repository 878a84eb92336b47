"""One update Δ = s·B·A as two factors: how many ranks it takes, and what fewer of them lose."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Pair:
    """A `[..., r, in]`, B `[..., out, r]`, s, and ‖s·B·A − Δ‖ / ‖Δ‖ for the Δ they stand for."""

    A: Tensor
    B: Tensor
    scale: float
    error: float = 0.0

    @property
    def rank(self) -> int:
        return self.A.shape[-2]

    def kept(self, ranks: Tensor) -> Pair:
        """Only the `ranks` (a mask `[r]`), and never none."""
        chosen = ranks.nonzero().flatten() if ranks.any() else ranks.new_zeros(1, dtype=torch.int64)
        return replace(self, A=self.A.index_select(-2, chosen), B=self.B.index_select(-1, chosen))

    def uniform(self, rank: int) -> Pair:
        """s = 1, the scale in B, and zeros up to `rank`."""
        exact = self.B.double() * self.scale
        B = exact.to(self.B.dtype)
        size, more = float(exact.norm()), rank - self.rank
        rounding = float((B.double() - exact).norm()) / size if size > 0 else 0.0
        return Pair(pad(self.A, (0, 0, 0, more)), pad(B, (0, more)), 1.0, self.error + rounding)


def contributing(pair: Pair) -> Tensor:
    """A mask `[r]` of the ranks whose row of A and column of B are both nonzero, in any map of a stack."""
    alive = pair.A.ne(0).any(-1) & pair.B.ne(0).any(-2)
    return alive.reshape(-1, alive.shape[-1]).any(0)


def compressed(pair: Pair, rank: int) -> Pair:
    """The `rank` largest singular triplets of B·A, by an SVD of its own size: B = Q₁R₁, Aᵀ = Q₂R₂, R₁R₂ᵀ = USVᵀ."""
    wide = torch.promote_types(pair.A.dtype, torch.float32)
    Q1, R1 = torch.linalg.qr(pair.B.to(wide))
    Q2, R2 = torch.linalg.qr(pair.A.to(wide).mT)
    U, S, Vh = torch.linalg.svd(R1 @ R2.mT, full_matrices=False)
    return _cut(Q1 @ U, S, Vh @ Q2.mT, rank, pair.A.dtype, pair.scale)


def factored(update: Tensor, rank: int, dtype: torch.dtype) -> Pair:
    """The `rank` largest singular triplets of `update` `[..., out, in]`, with s = 1 and factors in `dtype`."""
    U, S, Vh = torch.linalg.svd(update, full_matrices=False)
    return _cut(U, S, Vh, rank, dtype, 1.0)


def _cut(U: Tensor, S: Tensor, Vh: Tensor, rank: int, dtype: torch.dtype, scale: float) -> Pair:
    root = S[..., :rank].sqrt()
    A = (root[..., None] * Vh[..., :rank, :]).to(dtype)
    B = (U[..., :rank] * root[..., None, :]).to(dtype)
    size = float(S.norm())
    lost = float((B.to(S.dtype) @ A.to(S.dtype) - (U * S[..., None, :]) @ Vh).norm())
    return Pair(A, B, scale, lost / size if size > 0 else 0.0)
