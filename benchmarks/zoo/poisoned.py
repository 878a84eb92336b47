"""Tensors within NaN, for kernels: a read out of bounds makes a result NaN, and so does an element never written."""

from __future__ import annotations

import torch
from torch import Tensor


def within_nan(tensor: Tensor, margin: int = 16) -> Tensor:
    """The same values as a view into a larger tensor of NaN: NaN before, after and between its rows."""
    larger = torch.full([size + 2 * margin for size in tensor.shape], float("nan"), dtype=tensor.dtype)
    view = larger[tuple(slice(margin, margin + size) for size in tensor.shape)]
    return view.copy_(tensor)


def flat_within_nan(tensor: Tensor, margin: int = 16) -> Tensor:
    """The same values, contiguous, within NaN or, of integers, the largest there is: for storage that is one run."""
    poison = float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
    larger = torch.full((tensor.numel() + 2 * margin,), poison, dtype=tensor.dtype)
    return larger[margin : margin + tensor.numel()].view(tensor.shape).copy_(tensor)


def unwritten(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A contiguous output, every element NaN."""
    return torch.full(shape, float("nan"), dtype=dtype)


def bound_ratio(value: Tensor, exact: Tensor | None, magnitude: Tensor) -> float:
    """max |value − exact| / (u·magnitude), u the unit roundoff of value's dtype; 0/0 is 0, NaN counts as infinite."""
    assert exact is not None
    error = (value.double() - exact).abs()
    ratio = torch.where(error == 0, 0.0, error / (magnitude * torch.finfo(value.dtype).eps / 2))
    return float(ratio.nan_to_num(nan=torch.inf).max())
