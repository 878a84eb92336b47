"""Which calls are alike enough to share one choice of kernel."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class ShapeClass(NamedTuple):
    """Rows rounded up to a power of two, since they change from batch to batch; widths exactly, since they belong to
    the model; ranks as the kernels pad them, to multiples of 16. `device` also names the software that was measured.
    """

    op: str
    dtype: str
    rows: int
    widths: tuple[int, ...]
    ranks: tuple[int, ...]
    device: str

    def __str__(self) -> str:
        """The key in the file of choices."""
        return "|".join(map(str, (self.op, self.dtype, self.rows, self.widths, self.ranks, self.device)))


def shape_class(
    op: str, dtype: torch.dtype, rows: int, widths: tuple[int, ...], ranks: tuple[int, ...], device: torch.device
) -> ShapeClass:
    padded = tuple(-(-rank // 16) * 16 for rank in ranks)
    return ShapeClass(op, str(dtype), 1 << max(rows - 1, 0).bit_length(), widths, padded, described(device))


@functools.cache
def described(device: torch.device) -> str:
    """Name and compute capability of a CUDA device, and the versions of what makes its kernels; else its type."""
    if device.type != "cuda":
        return device.type
    import triton

    major, minor = torch.cuda.get_device_capability(device)
    name = torch.cuda.get_device_name(device)
    return f"{name} sm_{major}{minor} torch {torch.__version__} triton {triton.__version__}"
