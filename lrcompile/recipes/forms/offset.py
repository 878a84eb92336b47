"""LoRA that starts with a part of the weight in its factors, and the same part taken off the weight."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from torch import Tensor

from lrcompile.recipes.forms.adapter import Start
from lrcompile.recipes.forms.pair import LoraAdapter
from lrcompile.specs import Spec


class OffsetAdapter(LoraAdapter):
    """Δ = s·(B·A − B₀·A₀): the base keeps its bits and the pair it starts from is subtracted beside it.

    A `[rank, in]` and B `[out, rank]` train, A0 and B0 are what they started as. While the adapter acts the map is one
    product of rank 2r. With `residual="fold"` the offset lies in the weight instead (W − s·B₀·A₀ in its dtype), which
    costs one rounding and saves half of that product.
    """

    A0: Tensor
    B0: Tensor

    @classmethod
    def shapes(cls, in_features: int, out_features: int, rank: int) -> Mapping[str, tuple[int, ...]]:
        pair = super().shapes(in_features, out_features, rank)
        return {**pair, "A0": pair["A"], "B0": pair["B"]}

    def configure(self, spec: Spec, shared: object) -> None:
        self.folded = spec.residual == "fold"

    def finish(self, start: Start) -> None:
        self.A0.copy_(self.A)
        self.B0.copy_(self.B)

    def factors(self) -> tuple[Tensor, Tensor]:
        return (self.A, self.B) if self.folded else self.beside_base()

    def beside_base(self) -> tuple[Tensor, Tensor]:
        """Those of rank 2r, whether the offset lies in the weight now or not."""
        return torch.cat((self.A, self.A0), dim=-2), torch.cat((self.B, -self.B0), dim=-1)

    @property
    def variant(self) -> Hashable:
        return self.folded

    def offset(self, dtype: torch.dtype) -> Tensor:
        """s·weight·B₀·A₀, with the float32 scale that the forward uses."""
        with torch.no_grad():
            return (self.B0.to(dtype) @ self.A0.to(dtype)) * self.scale.to(dtype)
