"""A quantized folder opened with nothing but what lies in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from lrcompile.quantized_folders import check_quantized, load_quantized

Model = TypeVar("Model", bound=nn.Module)


def open_quantized(folder: str | Path, build: Callable[[], Model]) -> Model:
    """`build()` gives the plain model with any weights: on the meta device first, so that a config which claims more
    than the folder stores is refused before that much is allocated.
    """
    with torch.device("meta"):
        outline = build()
    check_quantized(outline, folder)
    model = build()
    load_quantized(model, folder)
    return model.eval()
