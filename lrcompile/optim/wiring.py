"""Calling rules around the steps of a real optimizer, whoever takes them: a loop, a Trainer, a gradient scaler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lrcompile.errors import AdapterError
from lrcompile.optim.rule import Rule, Step

STEPS = "lrcompile_steps"
"""Key of the number of completed steps in the first parameter group, where `state_dict` keeps it."""


def wire(optimizer: torch.optim.Optimizer, rules: Sequence[Rule], check: Callable[[], None]) -> None:
    """Let every step of `optimizer` be `check`, the rules' `before_step`, its own step, the rules' `after_step`.

    A step that a gradient scaler skips, inside the optimizer or before it, is none. A closure runs before the rules
    do, once.
    """
    first = optimizer.param_groups[0]
    first[STEPS] = 0

    def completed() -> int:
        return int(optimizer.param_groups[0].get(STEPS, 0))

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
        if closure is None:
            begin()
            return None
        if not rules:
            replaced = _then(closure, check)
        elif isinstance(optimizer, torch.optim.LBFGS):
            raise AdapterError("LBFGS evaluates its closure many times a step, and this method acts once a step")
        else:
            with torch.enable_grad():
                loss = closure()
            begin()
            replaced = lambda: loss  # noqa: E731
        return ((args[0], replaced, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": replaced})

    def begin() -> None:
        if not _skipped(optimizer):
            check()
            with torch.no_grad(), _unscaled(optimizer):
                for rule in rules:
                    rule.before_step(Step(optimizer, completed() + 1))

    def after(*_: Any) -> None:
        if _skipped(optimizer):
            return
        optimizer.param_groups[0][STEPS] = completed() + 1
        with torch.no_grad(), _unscaled(optimizer):
            for rule in rules:
                rule.after_step(Step(optimizer, completed()))

    def started(_: Any) -> None:
        for rule in rules:
            rule.started(Step(optimizer, completed() + 1))

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    optimizer.register_load_state_dict_post_hook(started)
    started(optimizer)


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
