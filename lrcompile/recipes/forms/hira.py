"""HiRA: an update that is the weight itself, each element times one of a low-rank product."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor, nn

from lrcompile.dialect import hadamard as hadamard  # registers torch.ops.lrcompile.hadamard
from lrcompile.recipes.forms.adapter import NotSwappable
from lrcompile.recipes.forms.hosted import Hosted
from lrcompile.recipes.forms.pair import LoraAdapter


class HadamardAdapter(Hosted, LoraAdapter):
    """Δ = s·W ⊙ BA, s = 1 but for the weight of `activate`: A `[rank, in]` and B `[out, rank]` train, as in LoRA.

    Δ has the rank of W, and no form cheaper than a matrix of W's size: training keeps one for each site beside W, and
    on an NF4 layer W's values too.
    """

    uses = frozenset({"product"})

    def forward(self, y: Tensor, x: Tensor, host: nn.Module | None = None) -> Tensor:
        assert host is not None  # linear layers hand themselves over
        return torch.ops.lrcompile.hadamard.default(
            y, x, *self.operands(), self.scale, self.base_weight(host), self.probability
        )

    def change(self, weight: Tensor, base: Tensor) -> Tensor:
        return base * self.delta(base.dtype).to(base.device)

    def swappable(self, host: nn.Module) -> NoReturn:
        raise NotSwappable("its update s·W ⊙ BA has the rank of W, and what computes it is as large as W")
