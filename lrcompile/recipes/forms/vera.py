"""One frozen random pair for all sites, scaled at each by two vectors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrcompile.recipes.forms.adapter import Start
from lrcompile.recipes.forms.pair import LowRank
from lrcompile.sites.site import Site
from lrcompile.specs import Spec


@dataclass
class Projections:
    """The pair all sites share; `kept` by the first, under whose name alone a state dict has it."""

    A: nn.Parameter
    B: nn.Parameter
    kept: bool = False


class VeraAdapter(LowRank):
    """Δ = diag(λ_b)·B·diag(λ_d)·A  (arXiv 2310.11454): λ_d `[rank]` and λ_b `[out]` train.

    A `[rank, widest in]` and B `[widest out, rank]` are drawn once from the spec's seed, on the CPU, A first, and
    shared: a site of width in → out uses the first in columns of A and the first out rows of B. Both are uniform in
    ±√6/√fan_in. λ_d starts at `d_initial`, λ_b at 0. The vectors join B, so with A frozen a site saves xAᵀ and no x.
    """

    uses = frozenset({"product", "rows", "experts", "graph"})
    lambda_d: Tensor
    lambda_b: Tensor
    A: Tensor
    B: Tensor

    @classmethod
    def shapes(cls, in_features: int, out_features: int, rank: int) -> Mapping[str, tuple[int, ...]]:
        return {"lambda_d": (rank,), "lambda_b": (out_features,)}

    @classmethod
    def share(cls, spec: Spec, sites: Sequence[Site], *, dtype: torch.dtype, device: torch.device) -> Projections:
        widest_in = max(site.in_features for site in sites)
        widest_out = max(site.out_features for site in sites)
        generator = torch.Generator().manual_seed(spec.seed or 0)
        return Projections(
            _projection(spec.rank, widest_in, generator, dtype, device),
            _projection(widest_out, spec.rank, generator, dtype, device),
        )

    def configure(self, spec: Spec, shared: Projections) -> None:
        self.d_initial = spec.d_initial
        self.A, self.B = shared.A, shared.B
        self.keeps_pair, shared.kept = not shared.kept, True

    def begin(self, start: Start) -> None:
        self.lambda_d.fill_(self.d_initial)
        self.lambda_b.zero_()

    def factors(self) -> tuple[Tensor, Tensor]:
        here = self.lambda_b.device
        A, B = (each if each.device == here else each.to(here) for each in (self.A, self.B))
        A = A[:, : self.in_features]
        if self.lambda_b.dim() > 1:
            A = A.expand(self.lambda_b.shape[0], -1, -1)
        both = self.lambda_b.unsqueeze(-1) * self.lambda_d.unsqueeze(-2)  # B trains not, so its factor is not kept
        return A, both * B[: self.out_features]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """A model's state has the pair once: safetensors, and so `save_pretrained`, takes no tensor twice."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.keeps_pair and not keep_vars:
            for name in ("A", "B"):
                del destination[prefix + name]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *given: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *given)
        if not self.keeps_pair:
            missing = given[2]
            missing[:] = [key for key in missing if key not in (f"{prefix}A", f"{prefix}B")]


def _projection(
    rows: int, columns: int, generator: torch.Generator, dtype: torch.dtype, device: torch.device
) -> nn.Parameter:
    if device.type == "meta":
        return nn.Parameter(torch.empty(rows, columns, dtype=dtype, device=device), requires_grad=False)
    bound = math.sqrt(6 / columns)
    drawn = torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)
    return nn.Parameter(drawn.to(device=device, dtype=dtype), requires_grad=False)
