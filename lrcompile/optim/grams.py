"""Small symmetric matrices of a pair's factors, in float64: they are ranks wide, and squares of what may be tiny."""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = 1e-8
"""Added to each Gram matrix's diagonal, as the official code of LoRA-FA and LoRA-Pro does."""


def gram(factor: Tensor) -> Tensor:
    """F·Fᵀ + 1e-8·I `[..., rank, rank]` of F `[..., rank, n]`, in float64."""
    wide = factor.double()
    return wide @ wide.mT + DAMPING * torch.eye(factor.shape[-2], dtype=torch.float64, device=factor.device)


def inverse(gram: Tensor) -> Tensor:
    """Of a symmetric positive definite matrix."""
    return torch.cholesky_inverse(torch.linalg.cholesky(gram))


def wide(tensor: Tensor) -> torch.dtype:
    """The dtype to do arithmetic on a gradient in: its own, float32 at least."""
    return torch.promote_types(tensor.dtype, torch.float32)
