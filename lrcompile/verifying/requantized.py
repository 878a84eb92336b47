"""The eager twin of an export that stored weights as NF4: the same model, each stored weight at its quantized value."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import nn

import lrcompile
from lrcompile.kernels.nf4_dequant import dequantize_nf4, quantize_nf4


def requantized(model: nn.Module, sites: Iterable[str], merged: bool, block_size: int = 64) -> nn.Module:
    """A copy in which W becomes dq(q(W)) at each of `sites`, adapters folded into W before that if `merged`."""
    twin = copy.deepcopy(model)
    if merged:
        lrcompile.merge(twin, final=True)
    with torch.no_grad():
        for site in sites:
            weight = twin.get_parameter(f"{site}.weight".lstrip("."))
            stored = quantize_nf4(weight, block_size)
            weight.copy_(dequantize_nf4(stored, tuple(weight.shape), block_size, weight.dtype))
    return twin
