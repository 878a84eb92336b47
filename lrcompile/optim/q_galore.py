"""Q-GaLore's step: GaLore's, into codes, and at each site's own pace."""

from __future__ import annotations

import torch

from lrcompile import sites
from lrcompile.optim.galore import Lift
from lrcompile.recipes.forms.galore import ProjectedGradient
from lrcompile.recipes.forms.q_galore import QuantizedProjectedGradient
from lrcompile.sites.site import Site


class LazyLift(Lift):
    """dq(W) ← Q((1 − lr·λ)·dq(W) + scale·lift(Z)), rounded stochastically  (arXiv 2407.08296): right on average, so
    that steps smaller than a code's distance are not lost. The random numbers depend on seed, site and step only.
    """

    def write(self, site: Site, adapter: ProjectedGradient, keep: float, number: int) -> None:
        assert isinstance(adapter, QuantizedProjectedGradient)
        weight = sites.weight_of(self.model, site)
        new = self.lifted(weight, adapter, keep)
        generator = torch.Generator(new.device).manual_seed(adapter.seed_at(number))
        adapter.hold(new.mT if site.transposed else new, generator)

    def gap(self, adapter: ProjectedGradient) -> int:
        assert isinstance(adapter, QuantizedProjectedGradient)
        return adapter.gap_now
