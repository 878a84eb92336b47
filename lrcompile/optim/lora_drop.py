"""LoRA-drop's selection: who keeps a pair of factors, and the one pair that all others share."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence

import torch
from torch import nn

from lrcompile.errors import AdapterError
from lrcompile.optim.rule import Rule, Step
from lrcompile.recipes.forms.lora_drop import KEPT, MEASURING, SHARED, WAITING, MeasuredLora
from lrcompile.recipes.initialisers.random import fill, generator_of
from lrcompile.sites.site import Site
from lrcompile.state import state_of

Placed = tuple[Site, MeasuredLora]


def importances(energies: Sequence[float]) -> list[float]:
    """I = g/Σg, which sum to 1; zeros where all are."""
    total = sum(energies)
    return [energy / total if total else 0.0 for energy in energies]


def kept(energies: Sequence[float], threshold: float) -> list[bool]:
    """Who belongs to the smallest set of most important sites whose importances sum to `threshold` or more.

    Of equal ones the first come first. All, where the threshold is 1 or nothing was measured.
    """
    shares = importances(energies)
    if threshold == 1 or not any(shares):
        return [True] * len(shares)
    chosen, reached = [False] * len(shares), 0.0
    for index in sorted(range(len(shares)), key=lambda i: -shares[i]):
        if reached >= threshold:
            break
        chosen[index] = True
        reached += shares[index]
    return chosen


class Selection(Rule):
    """After `warmup_steps` optimizer steps the sites that add little share one pair, by kind of projection  (arXiv
    2402.07721; its threshold and how long to measure are not verified).

    Energies g are measured over the second half of the warm-up, the first half giving B time to leave 0. The first of
    the others, in the order of the model's parameters, gives its pair, which starts anew (A as at first, B = 0) with an
    optimizer state of its own; the others' parameters leave model and optimizer. The scale of each site stays.
    """

    def __init__(self, model: nn.Module, name: str):
        super().__init__(model, name)
        self.known = [tensor for _, adapter in self._placed() for tensor in (adapter.A, adapter.B)]
        """What an optimizer made now holds of this adapter."""

    def check(self, cls: Callable[..., torch.optim.Optimizer]) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise AdapterError(
                "lora-drop exchanges parameters in the middle of training, which DistributedDataParallel and FSDP do"
                " not follow, and every process would select by what it has seen; train the method in one process"
            )

    def started(self, step: Step) -> None:
        self._measure_before(step.number)

    def before_step(self, step: Step) -> None:
        if step.number > self.spec.warmup_steps and not self._selected():
            raise AdapterError(
                f"step {step.number} is past warmup_steps={self.spec.warmup_steps}, but this model has not selected"
                " yet: the optimizer's state was loaded without the model's of the same step"
            )

    def after_step(self, step: Step) -> None:
        if self._selected():
            return
        if step.number < self.spec.warmup_steps:
            self._measure_before(step.number + 1)
            return
        self.check(type(step.optimizer))
        kinds: dict[Hashable, list[Placed]] = {}
        for site, adapter in self._placed():
            kinds.setdefault(adapter.kind, []).append((site, adapter))
        for members in kinds.values():
            self._select(members)
        for adapter in (adapter for members in kinds.values() for _, adapter in members):
            if adapter.stage == SHARED:
                for tensor in (adapter.A, adapter.B):
                    step.optimizer.state.pop(tensor, None)
                    tensor.grad = None
        self.align(step.optimizer)

    def _placed(self) -> Iterator[Placed]:
        for site, adapter in self.adapters():
            assert isinstance(adapter, MeasuredLora)
            yield site, adapter

    def _selected(self) -> bool:
        return all(adapter.stage in (KEPT, SHARED) for _, adapter in self._placed())

    def _measure_before(self, number: int) -> None:
        """Measure from the forwards of step `number` on, if they are of the second half."""
        if self.spec.warmup_steps // 2 < number <= self.spec.warmup_steps:
            for _, adapter in self._placed():
                if adapter.stage == WAITING:
                    adapter.enter(MEASURING)

    def _select(self, members: list[Placed]) -> None:
        energies = [float(adapter.energy) for _, adapter in members]
        choice = kept(energies, self.spec.threshold)
        dropped = [each for each, stays in zip(members, choice, strict=True) if not stays]
        for (_, adapter), stays in zip(members, choice, strict=True):
            if stays:
                adapter.enter(KEPT)
        if dropped:
            self._share(dropped)
        projection = members[0][1].projection or members[0][0].name
        measured = "" if any(energies) else ", as none added anything while measured"
        state_of(self.model).notes.append(
            f"{self.name}: of {len(members)} sites {projection!r}, {sum(choice)} keep their own factors{measured}"
            + (f", {len(dropped)} share one pair" if dropped else "")
        )

    def _share(self, dropped: list[Placed]) -> None:
        order = {id(tensor): place for place, tensor in enumerate(self.model.parameters())}
        dropped.sort(key=lambda each: order[id(each[1].A)])
        site, first = dropped[0]
        generator = generator_of(self.spec.seed, f"{site.name} shared", first.A.device)
        fill("lookup" if site.form == "lookup" else self.spec.init, first.A, first.B, generator)
        for _, adapter in dropped:
            adapter.A.data, adapter.B.data = first.A.data, first.B.data
            adapter.enter(SHARED)

    def align(self, optimizer: torch.optim.Optimizer) -> None:
        """Take out of `optimizer` what has left the model."""
        now = [tensor for _, adapter in self._placed() for tensor in (adapter.A, adapter.B)]
        gone = {id(tensor) for tensor in self.known} - {id(tensor) for tensor in now}
        for tensor in self.known:
            if id(tensor) in gone:
                optimizer.state.pop(tensor, None)
        for group in optimizer.param_groups:
            group["params"] = [tensor for tensor in group["params"] if id(tensor) not in gone]
        self.known = now
