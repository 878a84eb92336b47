"""Which calls are alike enough to share one choice of kernel, and what the device they run on can do."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class ShapeClass(NamedTuple):
    """Rows rounded up to a power of two, since they change from batch to batch; widths exactly, since they belong to
    the model; ranks as the kernels pad them, to multiples of 16. `op` says all else that matters, like the storage of
    operands; `device` also names the software that was measured.
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
    rounded = 1 << (rows - 1).bit_length() if rows else 0  # none: for kernels that is no case of a few
    padded = tuple(-(-rank // 16) * 16 for rank in ranks)
    return ShapeClass(op, str(dtype), rounded, widths, padded, described(device))


@functools.cache
def described(device: torch.device) -> str:
    """A CUDA device's name and compute capability, and the versions of what makes its kernels; else the device."""
    if capability(device) == 0:
        return str(device)
    import triton

    name = torch.cuda.get_device_name(device)
    return f"{name} sm_{capability(device)} torch {torch.__version__} triton {triton.__version__}"


@functools.cache
def capability(device: torch.device) -> int:
    """90 for Hopper, 80 for Ampere; 0 where our Triton kernels do not run: no NVIDIA GPU, or no Triton."""
    if device.type != "cuda" or torch.version.hip is not None or importlib.util.find_spec("triton") is None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def processors(device: torch.device) -> int:
    """How many programs run at a time where one fills a multiprocessor; an H200's where there is no GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def storage(tensors: Iterable[Tensor]) -> str:
    """A letter for each matrix: r where rows, c where columns lie contiguous and load in vectors, else x."""
    return "".join("x" if not aligned(tensor) else "r" if tensor.stride(1) == 1 else "c" for tensor in tensors)


def aligned(matrix: Tensor) -> bool:
    """Whether its rows, or its columns, lie contiguous and begin at multiples of 16 elements, so that vectors load."""
    small, large = sorted(matrix.stride())
    return small == 1 and large % 16 == 0 and matrix.data_ptr() % 16 == 0
