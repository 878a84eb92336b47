"""`optimizer`: the class you name, over what trains, with the method's step rules and the check for dead targets wired
in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lrcompile.errors import AdapterError
from lrcompile.liveness import watcher
from lrcompile.optim.auxiliary import Contributed
from lrcompile.optim.identity import identity
from lrcompile.optim.lora_rite import LoraRite
from lrcompile.optim.rule import Rule
from lrcompile.optim.wiring import wire
from lrcompile.recipes import recipe
from lrcompile.recipes.recipe import part
from lrcompile.state import has_state, state_of

__all__ = ["LoraRite", "optimizer"]


def optimizer(
    model: nn.Module, cls: Callable[..., torch.optim.Optimizer], lr: float, **kw: Any
) -> torch.optim.Optimizer:
    """`cls` over the trainable parameters of `model`; a real `torch.optim.Optimizer` (state_dict, schedulers, Trainer,
    accelerate).

    `model` may be wrapped by now (DistributedDataParallel, fully_shard, torch.compile). The first step raises
    `TargetError` naming every adapter tensor no gradient reached, `AdapterError` naming those whose gradient is not
    finite. Raises `AdapterError` if nothing trains; `load_state_dict` does for the state of another method, other ranks
    or other sites.
    """
    if not isinstance(model, nn.Module):
        raise AdapterError(f"lrcompile.optimizer takes a model with an adapter, got {type(model).__name__}")
    if not callable(cls):
        raise AdapterError(f"lrcompile.optimizer takes an optimizer class such as torch.optim.AdamW, got {cls!r}")
    inner = next((module for module in model.modules() if has_state(module)), None)
    if inner is None:
        raise AdapterError("lrcompile.optimizer needs a model with an adapter; call lrcompile.apply first")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise AdapterError(
            "nothing trains: call lrcompile.activate(model, name, train=name) to choose the adapter that does"
        )
    rules = _rules(inner)
    groups: list[dict[str, Any]] = [{"params": parameters}]
    for rule in rules:
        rule.check(cls)
        groups = rule.groups(groups, lr)
    made = cls(groups, lr=lr, **kw)
    wire(made, rules, watcher(inner), identity(inner))
    return made


def _rules(model: nn.Module) -> list[Rule]:
    """The step rules of every adapter that trains, in the order their recipes name them."""
    state = state_of(model)
    methods = {name: recipe(state.specs[name].method) for name in state.training}
    with_aux: list[Rule] = [Contributed(model, name) for name, method in methods.items() if method.aux is not None]
    return with_aux[:1] + [part(path)(model, name) for name, method in methods.items() for path in method.rules]
