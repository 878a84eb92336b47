"""A schedule that starts again: the learning rates of the first stage, in every later one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from lrcompile.optim.rule import Rule, Step
from lrcompile.state import adapter_tensors, state_of

LEARNING_RATES = "lrcompile_stage_lrs"
"""Key of what the first stage's steps had, in the parameter groups of the adapter: `state_dict` keeps it."""


class Stages(Rule):
    """η_k = η_((k−1) mod period + 1): step k has the learning rate that step had in the first stage.

    So the schedule a user gives (a scheduler, or by hand), warm-up included, is that of one stage of `spec.period`
    steps. What it gives later is put back after each step, so that a scheduler which multiplies what it finds goes on
    undisturbed, but is not used. Other settings that a schedule moves (OneCycleLR's momentum) are not replayed.
    """

    def groups(self, groups: list[dict[str, Any]], lr: float) -> list[dict[str, Any]]:
        mine = {id(p) for p in trained_tensors(self)}
        out = []
        for group in groups:
            for chosen in (False, True):
                if members := [p for p in group["params"] if (id(p) in mine) is chosen]:
                    out.append({**group, "params": members})
        return out

    def acts(self) -> bool:
        """A stage counts every step."""
        return True

    def before_step(self, step: Step) -> None:
        k = (step.number - 1) % self.spec.period
        first = step.number <= self.spec.period
        for group in self._groups(step):
            if first:
                # A new list: a state_dict taken before shares the old one.
                group[LEARNING_RATES] = [*group.get(LEARNING_RATES, ()), float(group["lr"])]
            else:
                group[_GIVEN] = float(group["lr"])
                _set(group, group[LEARNING_RATES][k])

    def after_step(self, step: Step) -> None:
        for group in self._groups(step):
            if _GIVEN in group:
                _set(group, group.pop(_GIVEN))

    def _groups(self, step: Step) -> Iterator[dict[str, Any]]:
        mine = {id(p) for p in trained_tensors(self)}
        return (group for group in step.optimizer.param_groups if any(id(p) in mine for p in group["params"]))


_GIVEN = "lrcompile_given_lr"


def trained_tensors(rule: Rule) -> list[nn.Parameter]:
    """What trains of the rule's adapter: its own tensors, and base parameters it trains in full."""
    state = state_of(rule.model)
    own = [tensor for _, tensor in adapter_tensors(rule.model, state, rule.name) if tensor.requires_grad]
    return own + [rule.model.get_parameter(name) for name in state.trained.names_of(rule.name)]


def _set(group: dict[str, Any], lr: float) -> None:
    if isinstance(group["lr"], Tensor):  # a captured step reads it where it lies
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr
