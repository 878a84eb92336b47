"""Safetensors files with typed errors: the library has an exception of its own for a full disk and for a bad file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lrcompile.demo.sources import ModelError

if TYPE_CHECKING:
    from torch import Tensor, nn


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of `path` by name; `ModelError` if it is missing, truncated or something else."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot read the tensors in {path}: {error}") from error


def fill(model: nn.Module, path: str | Path) -> None:
    """Load `path` into `model`, every tensor of either; `ModelError` lists what does not fit."""
    state = read_tensors(path)
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
