"""Which tensors of an adapter no gradient reaches, or none that is a number: looked at once, before the first optimizer
step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from lrcompile.errors import AdapterError, TargetError
from lrcompile.sites import ADAPTERS
from lrcompile.state import adapter_tensors, state_of

PATIENCE = 100
"""Steps to wait where layers are dropped at random, before a layer never seen counts as dead."""


def watcher(model: nn.Module) -> Callable[[], None]:
    """What to call before each optimizer step: it looks before the first; with layer drop, until every tensor was seen
    or patience ends.
    """
    patience = left = PATIENCE if drops_layers(model) else 1

    def look() -> None:
        nonlocal left
        if left <= 0:
            return
        state = state_of(model)
        if left == patience and (broken := _not_finite(model)):
            state.dead = None
            raise AdapterError(_broken_message(model, broken))
        left -= 1
        seen = set() if state.dead is None else set(live_names(model)) - set(state.dead)
        state.dead = tuple(name for name in dead_names(model) if name not in seen)
        if not state.dead:
            left = 0
        elif left <= 0:
            raise TargetError(dead_message(state.dead))

    return look


def dead_names(model: nn.Module) -> list[str]:
    """Tensors that train and have no gradient after a backward pass. (An expert without a token has one, of zeros.)
    Parameters of the base count where they are all an adapter trains.
    """
    return [name for name, tensor in _training(model) if tensor.grad is None]


def live_names(model: nn.Module) -> list[str]:
    return [name for name, _ in _training(model)]


def dead_message(names: Sequence[str]) -> str:
    listed = "\n".join(f"  {name}" for name in names[:8]) + (f"\n  … ({len(names)} in all)" if len(names) > 8 else "")
    kind = "adapter" if all(ADAPTERS in name.split(".") for name in names) else "trained"
    return (
        f"no gradient reaches {len(names)} {kind} tensors:\n{listed}\nTheir weights are not used through their own"
        " modules on this path (read by a"
        " parent, computed, under no_grad, or not at all). Exclude these sites, or fix the path."
    )


def _not_finite(model: nn.Module) -> list[str]:
    """What trains and has a gradient that is infinite or not a number."""
    return [name for name, tensor in _with_gradient(model) if not bool(torch.isfinite(tensor.grad).all())]


def _with_gradient(model: nn.Module) -> list[tuple[str, Any]]:
    return [pair for pair in model.named_parameters() if pair[1].requires_grad and pair[1].grad is not None]


def _broken_message(model: nn.Module, broken: Sequence[str]) -> str:
    """All gradients are broken when the loss is; only some when the backward pass broke, at the last of them."""
    every = len(_with_gradient(model))
    tensors = [*model.named_parameters(), *model.named_buffers()]
    weights = [name for name, tensor in tensors if tensor.is_floating_point() and not bool(tensor.isfinite().all())]
    listed = [*broken[:4], *(["…"] if len(broken) > 5 else []), *broken[4:][-1:]]
    if weights:
        reason = f"These tensors of the model hold values that are not finite: {', '.join(weights[:5])}."
    elif len(broken) == every:
        reason = "All of them are, so the loss was: look at the batch, its labels, and the model's dtype."
    else:
        reason = "The others are finite, so the backward pass broke there: look at what follows the last of them."
    count = f"in {len(broken)} of {every} tensors that train"
    return "\n".join([f"the gradient is not finite at the first step, {count}:", *(f"  {n}" for n in listed), reason])


def _training(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    state = state_of(model)
    found: list[tuple[str, nn.Parameter]] = []
    for name in state.training:
        found += [pair for pair in adapter_tensors(model, state, name) if pair[1].requires_grad]
        if not state.sites[name]:
            found += [(key, model.get_parameter(key)) for key in state.trained.names_of(name)]
    return found


def drops_layers(model: nn.Module) -> bool:
    holders = [getattr(model, "config", None), *model.modules()]
    return any(
        _probability(getattr(holder, key, 0)) > 0
        for holder in holders
        for key in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
    )


def _probability(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0
