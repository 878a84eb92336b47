"""Factors from W = Q·R."""

from __future__ import annotations

from typing import Any

import torch

from lrcompile.recipes.forms.adapter import Start
from lrcompile.recipes.initialisers.svd import weight_of


def olora(adapter: Any, start: Start) -> None:
    """A = the first r rows of R, B = the first r columns of Q  (arXiv 2406.01775).

    B is orthonormal. The scale is not divided out, as in the authors' code: the weight gives up s·B·A.
    """
    Q, R = torch.linalg.qr(weight_of(adapter, start))
    adapter.A.copy_(R[..., : adapter.rank, :])
    adapter.B.copy_(Q[..., : adapter.rank])
