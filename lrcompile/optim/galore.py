"""GaLore's step: what an optimizer makes of the projected gradient is lifted into the weight."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lrcompile import sites
from lrcompile.errors import AdapterError
from lrcompile.optim.rule import Rule, Step
from lrcompile.recipes.forms.galore import ProjectedGradient
from lrcompile.sites.site import Site
from lrcompile.written import mark_written


class Lift(Rule):
    """W ← (1 − lr·λ)·W + scale·lift(Z), then Z ← 0  (arXiv 2403.03507), after every step.

    The optimizer has moved Z from 0 to −lr·N, N being whatever it makes of the projected gradient: its moments have
    Z's shape, its own decay has nothing to act on. λ is the `weight_decay` of Z's parameter group, if it has one;
    decay is always decoupled, whatever the optimizer does elsewhere. The sum is formed in float32 (float64 for a
    float64 weight) and cast once. Moments stay as they are when P changes, as in the official code.

    P is due at steps t = 0, T, 2T, …, t counting completed steps and T the spec's `update_proj_gap`.
    """

    def check(self, cls: Callable[..., torch.optim.Optimizer]) -> None:
        made = cls
        while isinstance(made, functools.partial):
            made = made.func
        if getattr(made, "__name__", "") == "Adafactor":
            raise AdapterError(
                f"Adafactor scales its step by the size of a parameter, and {self.spec.method} lets it step from zero;"
                " use AdamW, Adam, SGD or another optimizer whose step depends on gradients only"
            )

    def started(self, step: Step) -> None:
        self._schedule(step.number - 1, anew=step.number == 1)

    def after_step(self, step: Step) -> None:
        groups = {id(tensor): group for group in step.optimizer.param_groups for tensor in group["params"]}
        written = []
        for site, adapter in self._sites():
            if adapter.Z.grad is None:
                continue  # not reached this time; optimizers leave such a parameter alone, decay and all
            group = groups[id(adapter.Z)]
            self.write(site, adapter, 1 - float(group["lr"]) * float(group.get("weight_decay", 0.0)), step.number)
            adapter.Z.zero_()
            written.append(site.parameter)
        mark_written(self.model, self.name, written)
        self._schedule(step.number)

    def write(self, site: Site, adapter: ProjectedGradient, keep: float, number: int) -> None:
        """W ← keep·W + scale·lift(Z), as step `number` has it."""
        weight = sites.weight_of(self.model, site)
        weight.copy_(self.lifted(weight, adapter, keep))

    def lifted(self, weight: Tensor, adapter: ProjectedGradient, keep: float) -> Tensor:
        """keep·W + scale·lift(Z) in float32, or wider."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        return torch.addmm(weight.to(wide), *adapter.lift(wide), beta=keep, alpha=self.spec.scale)

    def _schedule(self, completed: int, *, anew: bool | None = None) -> None:
        for _, adapter in self._sites():
            gap = self.gap(adapter)
            adapter.schedule(completed // gap * gap, anew=anew)

    def gap(self, adapter: ProjectedGradient) -> int:
        return self.spec.update_proj_gap

    def _sites(self) -> Iterator[tuple[Site, ProjectedGradient]]:
        for site, adapter in self.adapters():
            assert isinstance(adapter, ProjectedGradient)  # what the recipes of this rule have
            yield site, adapter
