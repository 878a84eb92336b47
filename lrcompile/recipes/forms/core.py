"""A small matrix between two factors that stay as they start."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lrcompile.recipes.forms.adapter import Start
from lrcompile.recipes.forms.pair import LowRank
from lrcompile.recipes.initialisers.random import fill


class CoreAdapter(LowRank):
    """Δ = s·B·M·A: A `[rank, in]`, M `[rank, rank]`, B `[out, rank]`.

    M joins the factor on the far side, B·M, so that with A frozen the product xAᵀ is all that training saves.
    """

    A: Tensor
    B: Tensor
    M: Tensor

    @classmethod
    def shapes(cls, in_features: int, out_features: int, rank: int) -> Mapping[str, tuple[int, ...]]:
        return {"A": (rank, in_features), "M": (rank, rank), "B": (out_features, rank)}

    def begin(self, start: Start) -> None:
        fill("kaiming", self.A, self.B, start.generator)
        self.M.zero_()

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A, self.B @ self.M
