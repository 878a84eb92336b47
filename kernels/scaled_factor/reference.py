"""s·diag(r)·F·diag(c) in float32: a factor with a gain for each of its rows and for each of its columns.

What autograd makes of it is the truth for the gradients of r and c.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scaled_factor(factor: Tensor, rows: Tensor | None, columns: Tensor | None, scale: Tensor | None) -> Tensor:
    """factor `[n, m]`, rows `[n]`, columns `[m]`, scale 0-d; None for ones. In float32, or float64 where factor is."""
    dtype = torch.promote_types(factor.dtype, torch.float32)
    product = factor.to(dtype)
    if rows is not None:
        product = rows.to(dtype)[:, None] * product
    if columns is not None:
        product = product * columns.to(dtype)
    return product if scale is None else product * scale.to(dtype)
