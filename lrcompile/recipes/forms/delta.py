"""Delta-LoRA's pair: the weight that follows it is written as a second, frozen pair beside the base."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from lrcompile.recipes.forms.adapter import Start
from lrcompile.recipes.forms.pair import LoraAdapter
from lrcompile.specs import Spec


class DeltaAdapter(LoraAdapter):
    """Δ = s·(1 + λ)·B·A − s·λ·B₀·A₀, with the gradients of s·B·A for A and B; before it follows, Δ = s·B·A.

    A, A0 `[rank, in]`, B, B0 `[out, rank]`. The method (arXiv 2309.02411) adds λ·s·(Bₜ₊₁Aₜ₊₁ − BₜAₜ) to W after every
    step from some step on, at which the product was B₀A₀. Those sums telescope to λ·s·(BA − B₀A₀) for any optimizer
    and weight decay, so W keeps its bits, no step is lost to their rounding, and the base may be quantized. The method
    gives A and B the gradient of the s·B·A they appear in; through this form it would come out 1 + λ times as large.
    """

    A0: Tensor
    B0: Tensor
    following: Tensor
    """Persistent, boolean: casts leave it, checkpoints of the model hold it."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.ratio, self.follows = 0.0, False
        self.register_buffer("following", torch.zeros((), dtype=torch.bool, device=self.scale.device))

    @classmethod
    def shapes(cls, in_features: int, out_features: int, rank: int) -> Mapping[str, tuple[int, ...]]:
        pair = super().shapes(in_features, out_features, rank)
        return {**pair, "A0": pair["A"], "B0": pair["B"]}

    def configure(self, spec: Spec, shared: object) -> None:
        self.ratio = float(spec.ratio)

    def begin(self, start: Start) -> None:
        super().begin(start)
        self.A0.zero_()
        self.B0.zero_()

    def follow(self) -> None:
        """Let the weight follow from here on; the function does not change now."""
        with torch.no_grad():
            self.A0.copy_(self.A)
            self.B0.copy_(self.B)
            self.following.fill_(True)
        self.refresh()

    def refresh(self) -> None:
        if not self.following.is_meta:
            self.follows = bool(self.following)

    @property
    def variant(self) -> Hashable:
        return self.follows

    def factors(self) -> tuple[Tensor, Tensor]:
        if not self.follows:
            return self.A, self.B
        gain = 1 + self.ratio
        A = torch.cat((_with_gradient(self.A, 1 / gain), self.A0), dim=-2)
        return A, torch.cat((gain * _with_gradient(self.B, 1 / gain), -self.ratio * self.B0), dim=-1)


def _with_gradient(tensor: Tensor, share: float) -> Tensor:
    """`tensor` to the bit, handing back `share` of the gradient."""
    return tensor.detach() + (tensor - tensor.detach()) * share
