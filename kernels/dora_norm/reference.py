"""n_i = ‖(W + s·BA)_i‖ in plain torch, with the sum formed: the truth that is checked against."""

from __future__ import annotations

import torch
from torch import Tensor


def dora_norm(W: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    """n `[out]` of W `[out, in]`, A `[rank, in]`, B `[out, rank]`, scale 0-d  (arXiv 2402.09353)."""
    return torch.linalg.vector_norm(W + scale * (B @ A), dim=1)
