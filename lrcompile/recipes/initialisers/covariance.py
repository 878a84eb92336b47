"""Factors that start from the weight as the data sees it: the SVD of W·C, C the covariance of the input."""

from __future__ import annotations

import torch
from torch import Tensor

from lrcompile.recipes.forms.adapter import Start
from lrcompile.recipes.forms.pair import LoraAdapter
from lrcompile.recipes.initialisers.svd import split, weight_of

DAMPING = 0.01
INVERSE_ERROR = 0.05


def corda(adapter: LoraAdapter, start: Start) -> None:
    """W = UΣV̂ᵀ with W·C = UΣVᵀ and V̂ᵀ = VᵀC⁻¹; B₀ = U_r·(Σ_r/s)^½, A₀ = (Σ_r/s)^½·V̂_rᵀ, so s·B₀A₀ = U_rΣ_rV̂_rᵀ.

    `mode` ipm (instruction-previewed) takes the largest r triplets, those that matter most to the data; kpm
    (knowledge-preserved) the smallest, so that what matters to the data stays frozen  (arXiv 2406.05223). C is damped:
    a share of its mean diagonal, doubled from 1 %, is added until ‖C·C⁻¹ − I‖ < 0.05. The SVD is exact, in the dtype
    of the measurement.
    """
    W, C = weight_of(adapter, start), start.measured.to(adapter.A.device)
    damped, inverse = _inverted(C)
    U, S, Vh = torch.linalg.svd(W.to(C.dtype) @ damped, full_matrices=False)
    chosen = slice(None, adapter.rank) if start.spec.mode == "ipm" else slice(len(S) - adapter.rank, None)
    split(adapter, U[:, chosen], S[chosen], Vh[chosen] @ inverse)


def _inverted(C: Tensor) -> tuple[Tensor, Tensor]:
    """The damped covariance and its inverse."""
    unit = torch.eye(len(C), dtype=C.dtype, device=C.device)
    damping = DAMPING
    while True:
        damped = C + damping * C.diagonal().mean() * unit
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, unit) < INVERSE_ERROR:
            return damped, inverse
        damping *= 2
