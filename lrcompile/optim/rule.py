"""What a method does around each optimizer step: optimizer policies and schedules are both rules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrcompile.errors import AdapterError
from lrcompile.recipes.forms.adapter import Adapter
from lrcompile.recipes.forms.pair import LoraAdapter
from lrcompile.sites.site import Site
from lrcompile.specs import Spec
from lrcompile.state import adapter_set, state_of


@dataclass(frozen=True)
class Step:
    """One step of an optimizer."""

    optimizer: torch.optim.Optimizer
    number: int
    """From 1: the step that is about to be taken, or was just taken."""

    def group_of(self, tensor: Tensor) -> dict[str, Any]:
        """The parameter group of `tensor`: where its learning rate is."""
        return next(group for group in self.optimizer.param_groups if any(tensor is each for each in group["params"]))


class Rule:
    """One part of a recipe, for the adapter `name` of `model`; holds no state that a resumed run would miss.

    What must survive goes into `step.optimizer.state[parameter]` as tensors, from the first `after_step` on (an
    optimizer takes an empty state for a parameter it has not seen), or into tensors of the adapter.
    """

    def __init__(self, model: nn.Module, name: str):
        self.model, self.name = model, name

    @property
    def spec(self) -> Spec:
        return state_of(self.model).specs[self.name]

    def adapters(self) -> Iterator[tuple[Site, Adapter]]:
        """The adapter's sites and what it has there."""
        for site in state_of(self.model).sites[self.name]:
            yield site, adapter_set(self.model, site)[self.name]

    def pairs(self) -> Iterator[LoraAdapter]:
        """The adapters, of a form with factors A and B, whole ones."""
        for site, adapter in self.adapters():
            if not isinstance(adapter, LoraAdapter):
                raise AdapterError(f"{type(self).__name__} takes pairs of factors, got {adapter} at {site.name!r}")
            if hasattr(adapter.A, "full_tensor"):
                raise AdapterError(
                    f"{self.spec.method} takes whole factors, and those at {site.name!r} are sharded (DTensor): leave"
                    " them out with fully_shard(..., ignored_params=...)"
                )
            yield adapter

    def check(self, cls: Callable[..., torch.optim.Optimizer]) -> None:
        """Raise `AdapterError` if the method cannot be trained with the optimizer `cls`."""

    def groups(self, groups: list[dict[str, Any]], lr: float) -> list[dict[str, Any]]:
        """Split parameter groups, or give some options of their own; every parameter stays in exactly one."""
        return groups

    def started(self, step: Step) -> None:
        """The optimizer was made, or its state was loaded; `step.number` is the one to come."""

    def align(self, optimizer: torch.optim.Optimizer) -> None:
        """Bring the parameters of `optimizer` in line with the model's, whose structure a load may have changed; its
        state is about to be read or loaded.
        """

    def acts(self) -> bool:
        """Is the coming step one of this adapter's? Not where no gradient reached it: it was inactive, or frozen."""
        return any(p.grad is not None for _, adapter in self.adapters() for p in adapter.parameters())

    def before_step(self, step: Step) -> None:
        """Gradients are complete and unscaled; weights are those they were computed at."""

    def after_step(self, step: Step) -> None:
        """Weights are new, gradients are still there."""
