"""The optimizer's own update, compiled: its hooks stay in Python, its learning rates become tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lrcompile.backend import lrcompile
from lrcompile.optim.wiring import rules_of

UNTRACEABLE = (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit)
"""What torch raises where it cannot compile, before anything has run."""
OURS = "lrcompile_"
"""How keys begin that our optimizers keep in their groups; they count steps, and a graph would be guarded by them."""


class Update:
    """Callable in the place of `optimizer.step()`: from the second call on compiled, where that can be."""

    def __init__(self, optimizer: torch.optim.Optimizer, options: dict[str, Any]):
        self.optimizer = optimizer
        # Rules replace the optimizer's state, and then a compiled update would be compiled again.
        self.plain = not traceable(optimizer) or bool(rules_of(optimizer))
        self.settings: Any = None
        known = {key: options[key] for key in ("mode", "options") if key in options}
        compiled = torch.compile(own_step(optimizer), backend=lrcompile, fullgraph=True, **known)
        self.step = hooked(optimizer, torch.no_grad()(lambda: compiled(optimizer)))

    def __call__(self) -> None:
        if self.plain or self.settings is None:
            self.optimizer.step()
            self.settings = settings(self.optimizer)
            return
        self.plain = settings(self.optimizer) != self.settings
        if not self.plain:
            try:
                self.step()
                return
            except UNTRACEABLE:
                self.plain = True
        self.optimizer.step()


def traceable(optimizer: torch.optim.Optimizer) -> bool:
    """Is it one of torch's own, whose steps Dynamo knows?"""
    known = type(optimizer).__module__.startswith("torch.optim.")
    return known and not isinstance(optimizer, torch.optim.SparseAdam) and not optimizer.defaults.get("differentiable")


def own_step(optimizer: torch.optim.Optimizer) -> Callable[[torch.optim.Optimizer], Any]:
    """The step its class defines, without what torch wraps around it: hooks, and breaks of the graph."""
    return inspect.unwrap(type(optimizer).step)


def hooked(optimizer: torch.optim.Optimizer, update: Callable[..., Any]) -> Callable[..., Any]:
    """`update`, surrounded as the optimizer's step is by its hooks, with learning rates that may change."""
    rates: list[Tensor] = []

    def step(*args: Any) -> Any:
        _count_exactly(optimizer)

        def within(_: torch.optim.Optimizer) -> Any:
            with _variable(optimizer, rates):
                return update(*args)

        result = torch.optim.Optimizer.profile_hook_step(within)(optimizer)
        optimizer._opt_called = True  # type: ignore[attr-defined]  # as schedulers have it, or they warn
        return result

    return step


def _count_exactly(optimizer: torch.optim.Optimizer) -> None:
    """Where Dynamo traces Adam and its kin, 1 − β^step is a tensor; in float32 it is 3·10⁻⁵ off at the second step."""
    for group in optimizer.param_groups:
        for state in (optimizer.state[each] for each in group["params"] if each in optimizer.state):
            count = state.get("step")
            if isinstance(count, Tensor) and count.dtype == torch.float32 and not group.get("fused"):
                state["step"] = count.double()


@contextmanager
def _variable(optimizer: torch.optim.Optimizer, rates: list[Tensor]) -> Iterator[None]:
    """While open, what changes from step to step is no constant of a graph: rates are tensors, our counts away."""
    groups = optimizer.param_groups
    aside = [{key: group.pop(key) for key in list(group) if key.startswith(OURS)} for group in groups]
    given = [group["lr"] for group in groups]
    for index, (group, rate) in enumerate(zip(groups, given, strict=True)):
        if index == len(rates):
            device = group["params"][0].device if group["params"] else None
            rates.append(torch.zeros((), dtype=torch.float64, device=device))
        if not isinstance(rate, Tensor):
            group["lr"] = rates[index].fill_(rate)
    try:
        yield
    finally:
        for group, rate, kept in zip(groups, given, aside, strict=True):
            group["lr"] = rate
            group.update(kept)


def settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What a compiled update holds as constants; tensors it reads."""
    variable = ("params", "lr", "initial_lr")
    return [
        {key: id(value) if isinstance(value, Tensor) else value
         for key, value in group.items() if key not in variable and not key.startswith(OURS)}
        for group in optimizer.param_groups
    ]  # fmt: skip
