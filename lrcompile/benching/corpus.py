"""Text every machine with Python has, as bytes."""

from __future__ import annotations

import importlib
import sys
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

from lrcompile.errors import LrcompileError

_LIMIT = 4_000_000


def code() -> bytes:
    """The source of the standard library's single-file modules, in order of their names."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [root / f"{name}.py" for name in sorted(sys.stdlib_module_names)]
    text = b"\n".join(file.read_bytes() for file in files if file.is_file())[:_LIMIT]
    if not text:
        raise LrcompileError(f"no source under {root}: this Python ships without its library's text")
    return text


def documentation() -> bytes:
    """The reference manual as `help()` shows it."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return "\n".join(topics[name] for name in sorted(topics)).encode()


def windows(text: bytes, size: int) -> Tensor:
    """The text cut into rows of `size` bytes, uint8 `[rows, size]`; what is left over is dropped."""
    rows = len(text) // size
    return torch.frombuffer(bytearray(text[: rows * size]), dtype=torch.uint8).view(rows, size)
