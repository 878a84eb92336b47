"""The place a deployed graph keeps for an adapter it is given when it runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lrcompile.dialect import gain as gain  # registers torch.ops.lrcompile.gain
from lrcompile.recipes.forms.hosted import Hosted, base_bias
from lrcompile.recipes.forms.pair import LoraAdapter

NAME = "_slot"
"""What a slot is called among the adapters of its site; users' names begin with a letter or a digit."""
PAIR = ("A", "B")
TENSORS = (*PAIR, "row_gain", "output_gain", "input_gain")


class Slot(Hosted, LoraAdapter):
    """y' = l ⊙ (b + g ⊙ (ŷ − b)) with ŷ = y + (x ⊙ (p − 1))Wᵀ + (xAᵀ)Bᵀ, as far as a slot `holds` these tensors.

    A `[rank, in]`, B `[out, rank]`, g = `row_gain` and l = `output_gain` `[out]`, p = `input_gain` `[in]`. It stands
    in for adapters while a graph is captured: with B = 0 and gains of 1, as it is, the map is the base's.
    """

    uses = frozenset({"product", "rows", "experts", "lookup", "graph"})
    row_gain: Tensor
    output_gain: Tensor
    input_gain: Tensor

    def __init__(self, *sizes: Any, holds: Iterable[str], transposed: bool, **options: Any):
        super().__init__(*sizes, **options)
        self.holds, self.transposed = frozenset(holds), transposed
        with torch.no_grad():
            for name, tensor in self.named_parameters():
                tensor.fill_(0 if name in PAIR else 1).requires_grad_(False)

    @classmethod
    def shapes(cls, in_features: int, out_features: int, rank: int) -> Mapping[str, tuple[int, ...]]:
        gains = {"row_gain": (out_features,), "output_gain": (out_features,), "input_gain": (in_features,)}
        return {**super().shapes(in_features, out_features, rank), **gains}

    def forward(self, y: Tensor, x: Tensor, host: nn.Module | None = None) -> Tensor:
        if "input_gain" in self.holds:
            assert host is not None  # linear layers hand themselves over, and no other site has gains
            y = y + self.base_product(host, torch.ops.lrcompile.input_gain.default(x, self.input_gain))
        if "A" in self.holds:
            y = super().forward(y, x, host)
        if "row_gain" in self.holds:
            assert host is not None
            y = torch.ops.lrcompile.gain.default(y, self.row_gain, base_bias(host))
        if "output_gain" in self.holds:
            y = torch.ops.lrcompile.gain.default(y, self.output_gain)
        return y
