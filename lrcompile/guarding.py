"""Methods that act around optimizer steps need an optimizer that calls them: another one is refused at its first step.

A plain `torch.optim` optimizer over AdaLoRA's factors would never allocate, over GaLore's never move a weight, and
nothing would say so. One global hook looks at each optimizer once.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lrcompile.errors import AdapterError

STEPS = "lrcompile_steps"
"""Key of the number of completed steps in the first parameter group, where `state_dict` keeps it: the mark of an
optimizer that calls the rules.
"""

_watched: dict[int, tuple[weakref.ref, str]] = {}
_seen: weakref.WeakKeyDictionary[torch.optim.Optimizer, int] = weakref.WeakKeyDictionary()


def watch(parameters: Iterable[torch.nn.Parameter], method: str) -> None:
    """Let these be stepped by optimizers of `lrcompile.optimizer` only."""
    for parameter in parameters:
        held = weakref.ref(parameter, partial(_forget, id(parameter)))
        _watched[id(parameter)] = (held, method)


def _forget(key: int, _: object) -> None:
    _watched.pop(key, None)


def refuse_unwired(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    groups = optimizer.param_groups
    count = sum(len(group["params"]) for group in groups)
    if not _watched or STEPS in groups[0] or _seen.get(optimizer) == count:
        return
    trained = [p for group in groups for p in group["params"] if p.requires_grad and p.grad is not None]
    for parameter in trained:
        held, method = _watched.get(id(parameter), (None, ""))
        if held is not None and held() is parameter:
            raise AdapterError(
                f"{method} acts around each optimizer step, and this {type(optimizer).__name__} would leave that out:"
                " make it with lrcompile.optimizer(model, cls, lr)"
            )
    _seen[optimizer] = count


register_optimizer_step_pre_hook(refuse_unwired)
