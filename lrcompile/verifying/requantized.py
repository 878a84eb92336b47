"""The eager twin of an export that stored weights as NF4: the same model, each stored weight at its quantized value;
and what that leaves of an adapter's effect.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

import lrcompile
from lrcompile.effects import effect_on_outputs
from lrcompile.kernels.nf4_dequant import dequantize_nf4, quantize_nf4
from lrcompile.observing import Observed
from lrcompile.state import acting
from lrcompile.verifying.outputs import input_sets


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


def taken_by_codes(model: nn.Module, twin: nn.Module, inputs: Any) -> str | None:
    """What the twin's outputs y' keep of what active adapters change, y − y₀, in words; None where none is active.

    `inputs`: one set or a list of sets, as `lrcompile.verify` takes them.
    """
    if not acting(model):
        return None
    batches = input_sets(inputs)
    of_model = Observed(model, batches)
    with lrcompile.disabled(model):
        before = list(of_model.outputs())
    kept = effect_on_outputs(before, list(of_model.outputs()), Observed(twin, batches).outputs())
    return (
        f"storing weights as NF4 leaves {kept.share:.3f} of what the adapter does to the outputs, at a distance of"
        f" {kept.error:.2e} of it (cosine {kept.cosine:.3f})"
    )
