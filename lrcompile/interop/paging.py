"""Weights on the pages of a file: memory that the system writes out or drops when it is short, and takes back at will.

The files have no name from the moment they are mapped: their space is free again with the last tensor that uses them,
also after a process was killed. On a filesystem that is memory itself (tmpfs) nothing is gained.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SMALL = 64 << 10
"""Bytes; what is smaller stays where it is."""


class Pages(mmap.mmap):
    """`size` zero bytes that are a file in `folder`. Raises OSError when the disk is full, now and not when written."""

    def __new__(cls, folder: Path, size: int) -> Pages:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, size)
            return super().__new__(cls, file.fileno(), size)


def empty_like(tensor: Tensor, folder: Path, dtype: torch.dtype | None = None) -> Tensor:
    """As `torch.empty_like`, in a storage of its own that is a file in `folder`; in memory if it is small, on another
    device, or on a system where a full disk would end the process in the middle of a write.
    """
    like = torch.empty_like(tensor, dtype=dtype, device="meta")
    if tensor.device.type != "cpu" or not _worthwhile(like.nbytes):
        return torch.empty_like(tensor, dtype=dtype)
    return torch.frombuffer(Pages(folder, like.nbytes), dtype=like.dtype).as_strided(like.shape, like.stride())


def _worthwhile(nbytes: int) -> bool:
    return nbytes >= SMALL and hasattr(os, "posix_fallocate")


@contextmanager
def paged_constants(folder: Path) -> Iterator[None]:
    """Within the block Inductor collects the constants of what it compiles on the pages of a file in `folder`.

    `AotCodeCompiler.compile` (torch 2.13, `torch/_inductor/codecache.py`, line 2947) copies all of them into one
    `bytearray` first, and no option keeps it from that. Here the name means a mapped file within that module, which
    holds the same bytes; a torch that no longer asks for it takes more memory and computes the same.
    """
    from torch._inductor import codecache

    def paged(size: int) -> Any:
        return Pages(folder, size) if _worthwhile(size) else bytearray(size)

    names = vars(codecache)
    names["bytearray"] = paged
    try:
        yield
    finally:
        names.pop("bytearray", None)  # another thread's export may have taken it out already
