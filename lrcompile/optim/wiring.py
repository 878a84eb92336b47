"""Calling rules around the steps of a real optimizer, whoever takes them: a loop, a Trainer, a gradient scaler."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_pre_hooks

from lrcompile.errors import AdapterError
from lrcompile.guarding import STEPS, refuse_unwired
from lrcompile.optim.identity import difference
from lrcompile.optim.rule import Rule, Step

BELONGS = "lrcompile_belongs"
"""Key of the `identity` of what is trained, in the same place."""


def wire(optimizer: torch.optim.Optimizer, rules: Sequence[Rule], check: Callable[[], None], identity: str) -> None:
    """Let every step of `optimizer` be `check`, the rules' `before_step`, its own step, the rules' `after_step`.

    A step that a gradient scaler skips, inside the optimizer or before it, is none; nor is one, for an adapter's rules,
    without a gradient of that adapter. A closure runs before the rules
    do, once. A loaded state must have been saved with the same `identity`: `AdapterError` names the difference.
    """
    wiring = _Wiring(optimizer, rules, check, identity)
    optimizer.param_groups[0].update({STEPS: 0, BELONGS: identity})
    optimizer.register_step_pre_hook(wiring.before)
    optimizer.register_step_post_hook(wiring.after)
    optimizer.register_state_dict_pre_hook(wiring.align)
    optimizer.register_load_state_dict_pre_hook(wiring.loading)
    optimizer.register_load_state_dict_post_hook(wiring.loaded)
    if type(optimizer).load_state_dict is not torch.optim.Optimizer.load_state_dict:  # bitsandbytes' calls no hooks
        optimizer.load_state_dict = wiring.hooked(optimizer.load_state_dict)  # type: ignore[method-assign]
    wiring.start()


def rules_of(optimizer: torch.optim.Optimizer) -> Sequence[Rule]:
    """The rules that act at its steps; others were done with when it was made."""
    rules = [rule for wiring in _wirings(optimizer) for rule in wiring.rules]
    idle = Rule.before_step, Rule.after_step
    return [rule for rule in rules if (type(rule).before_step, type(rule).after_step) != idle]


def foreign_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Has somebody else registered what is to be called before its steps, or before those of all optimizers?"""
    hooks = optimizer._optimizer_step_pre_hooks.values()
    everywhere = _global_optimizer_pre_hooks.values()
    return len(hooks) > len(_wirings(optimizer)) or any(hook is not refuse_unwired for hook in everywhere)


def _wirings(optimizer: torch.optim.Optimizer) -> list[_Wiring]:
    hooks = optimizer._optimizer_step_pre_hooks.values()
    owners = [getattr(hook, "__self__", None) for hook in hooks]
    return [owner for owner in owners if isinstance(owner, _Wiring)]


class _Wiring:
    def __init__(
        self, optimizer: torch.optim.Optimizer, rules: Sequence[Rule], check: Callable[[], None], identity: str
    ):
        self.optimizer, self.rules, self.check, self.identity = optimizer, rules, check, identity
        self.outer: FrameType | None = None
        """Of the step that is being taken."""
        self.acting: list[Rule] = []
        """The rules whose adapters the step is one of."""

    @property
    def completed(self) -> int:
        return int(self.optimizer.param_groups[0][STEPS])

    def before(
        self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self.outer is not None and _running(self.outer):
            return None  # a `step` that calls its parent's, which torch hooks as well
        self.outer = sys._getframe(1)
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
        if closure is None:
            self.begin()
            return None
        if not self.rules:
            replaced = _then(closure, self.check)
        elif isinstance(self.optimizer, torch.optim.LBFGS):
            raise AdapterError("LBFGS evaluates its closure many times a step, and this method acts once a step")
        else:
            with torch.enable_grad():
                loss = closure()
            self.begin()
            replaced = lambda: loss  # noqa: E731
        return ((args[0], replaced, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": replaced})

    def begin(self) -> None:
        if not _skipped(self.optimizer):
            self.check()
            self.acting = [rule for rule in self.rules if rule.acts()]
            with torch.no_grad(), _unscaled(self.optimizer):
                for rule in self.acting:
                    rule.before_step(Step(self.optimizer, self.completed + 1))

    def after(self, *_: Any) -> None:
        if self.outer is not sys._getframe(1):
            return
        self.outer = None
        if _skipped(self.optimizer) or (self.rules and not self.acting):
            return
        self.optimizer.param_groups[0][STEPS] = self.completed + 1
        with torch.no_grad(), _unscaled(self.optimizer):
            for rule in self.acting:
                rule.after_step(Step(self.optimizer, self.completed))

    def loading(self, _: Any, state_dict: dict[str, Any]) -> None:
        self.require_ours(state_dict["param_groups"][0])
        self.align(self.optimizer)
        groups = self.optimizer.param_groups, state_dict["param_groups"]
        here, there = (sum(len(group["params"]) for group in each) for each in groups)
        if here != there:
            raise AdapterError(
                f"this optimizer state is of {there} parameters, and {here} train here; load the model's state of the"
                " same step first"
            )

    def align(self, _: Any) -> None:
        for rule in self.rules:
            rule.align(self.optimizer)

    def loaded(self, _: Any) -> None:
        self.start()

    def hooked(self, load: Callable[..., None]) -> Callable[..., None]:
        """`load`, with what a hook would do: before the next forward, which a rule may have to prepare."""

        def load_state_dict(state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            self.loading(None, state_dict)
            load(state_dict, *args, **kwargs)
            self.loaded(None)

        return load_state_dict

    def start(self) -> None:
        """Let the rules take up from the steps that the optimizer's state counts."""
        first = self.optimizer.param_groups[0]
        self.require_ours(first)
        first.setdefault(STEPS, 0)
        first[BELONGS] = self.identity
        for rule in self.rules:
            rule.started(Step(self.optimizer, self.completed + 1))

    def require_ours(self, group: dict[str, Any]) -> None:
        if self.rules and STEPS not in group:
            raise AdapterError(
                "this optimizer state does not say how many steps it has seen, which the method goes by; load one that"
                " an optimizer of lrcompile.optimizer saved"
            )
        differs = difference(group.get(BELONGS, self.identity), self.identity)
        if differs is not None:
            raise AdapterError(
                f"this optimizer state belongs to another adapter: {differs}; apply the spec it was saved with, or"
                " start without it"
            )


def _running(frame: FrameType) -> bool:
    """Is this call still going on? (A step that raised has left its frame behind.)"""
    current: FrameType | None = sys._getframe(1)
    while current is not None and current is not frame:
        current = current.f_back
    return current is frame


def _then(closure: Callable[[], Any], check: Callable[[], None]) -> Callable[[], Any]:
    """`closure`, its gradients looked at before they are used."""

    def run() -> Any:
        loss = closure()
        check()
        return loss

    return run


def _skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Has a gradient scaler told a fused optimizer to leave this step out?"""
    found: Tensor | None = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


class _unscaled:
    """While open, gradients are free of the scale that a gradient scaler leaves to a fused optimizer to take off."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        scale: Tensor | None = getattr(optimizer, "grad_scale", None)
        self.scale = None if scale is None else float(scale)

    def __enter__(self) -> None:
        if self.scale is not None:
            self._multiply(1 / self.scale)

    def __exit__(self, *_: object) -> None:
        if self.scale is not None:
            self._multiply(self.scale)

    def _multiply(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
