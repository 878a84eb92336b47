"""Keeping A's rows and B's columns orthonormal, so that a triplet's size is its E and triplets do not overlap."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lrcompile.recipes.forms.adalora import TripletAdapter
from lrcompile.recipes.forms.pair import LoraAdapter
from lrcompile.sharding import whole
from lrcompile.specs import Spec


def orthogonality(adapters: Sequence[LoraAdapter | TripletAdapter], spec: Spec) -> Tensor:
    """λ·mean of ‖AAᵀ − I‖_F and ‖BᵀB − I‖_F over all A and B of the adapter; the norms are not squared  (arXiv
    2303.10512, as its authors' code has it), λ = `orth_weight`.

    A `[..., rank, in]`, B `[..., out, rank]`; each map of a stack has a pair of its own. Returns a 0-d tensor.
    """
    device = adapters[0].A.device
    if not spec.orth_weight:
        return torch.zeros((), device=device)
    factors = [factor for adapter in adapters for factor in (whole(adapter.A), whole(adapter.B).mT)]
    with torch.autocast(device.type, enabled=False):  # ‖AAᵀ − I‖ is a difference of nearly equal numbers
        defects = [_defect(factor).flatten().to(device) for factor in factors]
        return spec.orth_weight * torch.cat(defects).mean()


def _defect(rows: Tensor) -> Tensor:
    """‖RRᵀ − I‖_F of R `[..., rank, width]`."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    gram = wide @ wide.mT
    return torch.linalg.matrix_norm(gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device))
