"""Random operands: within NaN for checks, at the shapes of Llama-3-8B for timings."""

from __future__ import annotations

import torch
from torch import Tensor

SHAPES = {"q": (4096, 4096), "k": (4096, 1024), "up": (4096, 14336), "down": (14336, 4096)}
"""in → out of its maps; o is as q, v as k, gate as up."""
GROUPS = {"qkv": (4096, (4096, 1024, 1024)), "gate_up": (4096, (14336, 14336))}
ROWS = (1, 16, 512, 8192)
RANK = 16
DRY_SHAPES = {"q": (32, 48)}
DRY_GROUPS = {"qkv": (32, (48, 16, 16))}
DRY_ROWS = (1, 16)


def within_nan(tensor: Tensor, margin: int = 16) -> Tensor:
    """The same values, in the same storage order, with NaN before, after and between the rows: what reads out of bounds
    shows it. Rows begin at multiples of 16 elements, as kernels that load in vectors want them.
    """
    if tensor.dim() == 2 and tensor.stride(0) == 1 != tensor.stride(1):
        return within_nan(tensor.t(), margin).t()
    sizes = [size + 2 * margin for size in tensor.shape]
    sizes[-1] += -sizes[-1] % 16
    larger = tensor.new_full(sizes, float("nan"))
    return larger[tuple(slice(margin, margin + size) for size in tensor.shape)].copy_(tensor)


def random(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=device)


def poison(bytes_each: int, device: torch.device) -> None:
    """Leave NaN in the memory that outputs of about this size are given next: what is never written shows it."""
    if device.type == "cuda":
        blocks = [
            torch.full((max(bytes_each // 2, 1),), float("nan"), dtype=torch.bfloat16, device=device) for _ in range(8)
        ]
        del blocks


def bound_ratio(value: Tensor, exact: Tensor, magnitude: Tensor) -> float:
    """max |value − exact| / (u·magnitude), u the unit roundoff of value's dtype; NaN counts as infinite."""
    ratio = (value.double() - exact).abs() / (magnitude * torch.finfo(value.dtype).eps / 2)
    return float(ratio.nan_to_num(nan=torch.inf).max())
