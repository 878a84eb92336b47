"""PeriodicLoRA's unload: what a stage has learned goes into the weight, and the next stage starts from nothing."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lrcompile.building import base_weight
from lrcompile.errors import AdapterError, MergeError
from lrcompile.mergeable import LIMIT
from lrcompile.optim.rule import Rule, Step
from lrcompile.optim.stages import trained_tensors
from lrcompile.recipes.forms.adapter import Start
from lrcompile.recipes.forms.pair import LoraAdapter, LowRank
from lrcompile.recipes.initialisers.random import generator_of
from lrcompile.sites import weight_of
from lrcompile.sites.site import Site
from lrcompile.state import adapter_set, require_settled, state_of
from lrcompile.written import mark_written

SEED = "lrcompile_unload_seed"
"""Key of the seed of fresh factors in the parameter group of the adapter: `state_dict` keeps it."""


class Unload(Rule):
    """W ← cast(W + m·s·B·A), B ← (1 − m)·B after every `period`-th optimizer step; the function stays what it was.

    s is the scale in force (the activation's weight included), m the spec's `momentum`. With m = 1 nothing of the pair
    is left, so A is drawn anew and the stage is a LoRA run from its start. The optimizer's state of all that the
    adapter trains is dropped, so its step count, where it keeps one, starts from 0; the schedule's part is `Stages`.

    The sum is formed in float32 (float64 for a float64 base) with one rounding to W's dtype. What rounding took is in
    the report; `MergeError` where that is more than half of an update, with the model as the step left it. Fresh
    factors come from the spec's seed, else from one made of the factors before the first step, which replicas have in
    common whatever their generators: replicas and resumed runs draw the same.

    The paper (arXiv 2402.16141) says that stages reset optimizer and schedule and that momentum damps the unload; its
    momentum formula, its period and its m could not be verified, so both are required fields, and the formula here is
    the one of this family that changes no output. (The one public implementation also shrinks A, which makes the
    outputs jump by −m(1 − m)·sBAx.)
    """

    def started(self, step: Step) -> None:
        for site, _ in self.adapters():
            weight = weight_of(self.model, site)
            if hasattr(weight, "full_tensor") or tuple(weight.shape[-2:]) != (site.out_features, site.in_features):
                raise AdapterError(
                    f"{self.spec.method} writes the weight of {site.name!r}, which is sharded here; train it with the"
                    " weights whole on each device (DistributedDataParallel)"
                )

    def acts(self) -> bool:
        """A stage counts every step, and one at which the adapter could not be unloaded is an error."""
        return True

    def before_step(self, step: Step) -> None:
        state = state_of(self.model)
        require_settled(state, "an optimizer step")
        if state.merged:
            raise MergeError(
                f"an optimizer step while {', '.join(map(repr, state.merged))} is merged: {self.spec.method} writes the"
                " weights; call lrcompile.unmerge(model) first"
            )
        if step.number == 1:
            self._group(step)[SEED] = self._seed()
        if step.number % self.spec.period == 1 % self.spec.period:
            self._require_additive()

    def after_step(self, step: Step) -> None:
        if step.number % self.spec.period:
            return
        self._require_additive()
        worst, where = self._measure(step.number)  # all sites before any is written
        for site, adapter in self._pairs():
            weight_of(self.model, site).copy_(self._update(site, adapter).new)
            self._restart(site, adapter, step)
        for tensor in trained_tensors(self):
            step.optimizer.state.pop(tensor, None)
        mark_written(self.model, self.name, [site.parameter for site, _ in self.adapters()])
        self._note(f"unload after step {step.number}: rounding took at most {worst:.1e} of the update (at {where})")

    def _require_additive(self) -> None:
        """Writing W changes nothing else only where all that acts beside it is added to its output."""
        state = state_of(self.model)
        if self.name not in state.active:
            raise AdapterError(
                f"adapter {self.name!r} trains and is not active, so its update is no part of the outputs; call"
                f" lrcompile.activate(model, {self.name!r}) before the optimizer's step"
            )
        for site, _ in self.adapters():
            adapters = adapter_set(self.model, site)
            for other in adapters.active:
                if type(adapters[other]).forward is not LowRank.forward or adapters[other].folded:
                    raise AdapterError(
                        f"adapter {other!r} ({state.specs[other].method}) is active at {site.name!r} and computes from"
                        f" the weight that {self.spec.method} writes; activate {self.name!r} without it"
                    )

    def _pairs(self) -> Iterator[tuple[Site, LoraAdapter]]:
        for site, adapter in self.adapters():
            assert isinstance(adapter, LoraAdapter)  # the recipe's form
            yield site, adapter

    def _measure(self, number: int) -> tuple[float, str]:
        """The largest share of an update that rounding will take, and where."""
        worst, where = -1.0, ""
        for site, adapter in self._pairs():
            lost = self._update(site, adapter).lost
            if not math.isfinite(lost):
                raise MergeError(
                    f"the update at {site.name!r} after step {number} holds values that are not finite; nothing was"
                    " unloaded"
                )
            if lost > LIMIT:
                raise MergeError(
                    f"the unload after step {number} would lose {lost:.0%} of the update at {site.name!r} to rounding"
                    f" to {weight_of(self.model, site).dtype}; nothing was unloaded. Train on a float32 base"
                    " (model.float() before apply), or give a longer period or a momentum nearer to 1"
                )
            worst, where = max((worst, where), (lost, site.name))
        return worst, where

    def _update(self, site: Site, adapter: LoraAdapter) -> _Update:
        old = weight_of(self.model, site)
        wide = torch.promote_types(old.dtype, torch.float32)
        delta = adapter.delta(wide).to(old.device) * self.spec.momentum
        new = (old.to(wide) + delta).to(old.dtype)
        size = delta.double().norm()
        lost = ((new.double() - old.double()) - delta.double()).norm()
        return _Update(new, float(lost / size) if size != 0 else 0.0)

    def _restart(self, site: Site, adapter: LoraAdapter, step: Step) -> None:
        if self.spec.momentum < 1:
            adapter.B.mul_(1 - self.spec.momentum)
            return
        stage = f"{site.name}, after step {step.number}"
        generator = generator_of(self._group(step)[SEED], stage, adapter.A.device)
        adapter.begin(Start(site, self.spec, partial(base_weight, self.model, site), generator))

    def _group(self, step: Step) -> dict[str, Any]:
        return step.group_of(trained_tensors(self)[0])

    def _seed(self) -> int:
        if self.spec.seed is not None:
            return self.spec.seed
        seed = 0
        for tensor in trained_tensors(self):
            seed = zlib.crc32(tensor.detach().contiguous().view(torch.uint8).cpu().numpy().data, seed)
        return seed

    def _note(self, said: str) -> None:
        mark = f"adapter {self.name!r}: unload after step "
        notes = state_of(self.model).notes
        notes[:] = [note for note in notes if not note.startswith(mark)] + [f"adapter {self.name!r}: {said}"]


@dataclass(frozen=True)
class _Update:
    new: Tensor
    lost: float
    """‖(W' − W) − Δ‖ / ‖Δ‖; 0 where Δ is 0."""
