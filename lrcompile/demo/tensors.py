"""Safetensors files with typed errors: the library has an exception of its own for a full disk and for a bad file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lrcompile.demo.sources import ModelError
from lrcompile.safe_tensors import read_tensors

if TYPE_CHECKING:
    from torch import nn


def fill(model: nn.Module, path: str | Path) -> None:
    """Load `path` into `model`, every tensor of either; `ModelError` lists what does not fit."""
    state = read_tensors(Path(path), ModelError)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(f"{path} does not fit this model: {' '.join(str(error).split())[:300]}") from error


@contextmanager
def writing() -> Iterator[None]:
    """A failure to write tensors is an `OSError`, like any other failure to write."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from error
