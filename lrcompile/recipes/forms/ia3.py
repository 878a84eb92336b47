"""(IA)³: one gain for each output of a layer, or for each of its inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lrcompile import targeting
from lrcompile.dialect import gain as gain  # registers torch.ops.lrcompile.gain
from lrcompile.names import meant
from lrcompile.recipes.forms.adapter import Start
from lrcompile.recipes.forms.hosted import Hosted
from lrcompile.sites.site import Site
from lrcompile.specs import Spec


class GainAdapter(Hosted):
    """y' = l ⊙ y, the bias included, or y' = (x ⊙ l)Wᵀ + b in the layers that `feedforward` names  (arXiv 2205.05638).

    An entry of `feedforward` is the end of a site's name and must hit one. l, `gain`, trains and starts at 1, so the
    map starts as the layer's, to the bit. With a weight w given to `activate` the gain is 1 + w·(l − 1).
    """

    uses = frozenset({"product"})
    gain: Tensor

    @classmethod
    def at(cls, spec: Spec, site: Site) -> type[GainAdapter]:
        return InputGain if _on_inputs(spec, site) else OutputGain

    @classmethod
    def demand(cls, spec: Spec, sites: Sequence[Site]) -> None:
        if spec.feedforward:
            targeting.require_hits([name for site in sites for name in site.names], spec.feedforward, "feedforward")

    def begin(self, start: Start) -> None:
        self.gain.fill_(1)

    def gains(self) -> Tensor:
        """1 + s·(l − 1), s the weight given to `activate`; in float32 or wider."""
        wide = self.gain.to(torch.promote_types(self.gain.dtype, torch.float32))
        return (wide - 1) * self.scale.to(wide.dtype) + 1


class OutputGain(GainAdapter):
    """y' = l ⊙ y: `gain` `[out]`."""

    @classmethod
    def shapes(cls, in_features: int, out_features: int, rank: int) -> Mapping[str, tuple[int, ...]]:
        return {"gain": (out_features,)}

    def forward(self, y: Tensor, x: Tensor, host: nn.Module | None = None) -> Tensor:
        return torch.ops.lrcompile.gain.default(y, self.gains())

    def swappable(self, host: nn.Module) -> Mapping[str, Tensor]:
        return {"output_gain": self.gains().detach()}

    def change(self, weight: Tensor, base: Tensor) -> Tensor:
        return (self.gains().detach() - 1).to(weight)[:, None] * weight

    def bias_change(self, bias: Tensor, base: Tensor, weight: Tensor) -> Tensor | None:
        return (self.gains().detach() - 1).to(bias) * bias


class InputGain(GainAdapter):
    """y' = y + (x ⊙ (l − 1))Wᵀ = (x ⊙ l)Wᵀ + b: `gain` `[in]`."""

    @classmethod
    def shapes(cls, in_features: int, out_features: int, rank: int) -> Mapping[str, tuple[int, ...]]:
        return {"gain": (in_features,)}

    def forward(self, y: Tensor, x: Tensor, host: nn.Module | None = None) -> Tensor:
        assert host is not None  # linear layers hand themselves over
        return y + self.base_product(host, torch.ops.lrcompile.input_gain.default(x, self.gains()))

    def swappable(self, host: nn.Module) -> Mapping[str, Tensor]:
        return {"input_gain": self.gains().detach()}

    def change(self, weight: Tensor, base: Tensor) -> Tensor:
        return base * (self.gains().detach() - 1).to(base)


def _on_inputs(spec: Spec, site: Site) -> bool:
    return bool(meant(spec.feedforward, site.names))
