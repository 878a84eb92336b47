"""The loss that a method adds to the model's own: `aux_loss`, and how it gets into `.loss` without anybody calling it.

A forward hook on the adapted model adds it to the output. It is a module-level function and its handle lies in the
model's state, so that `copy.deepcopy`, `torch.save` and a fresh process keep it and `remove` finds it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lrcompile.errors import AdapterError
from lrcompile.recipes import recipe
from lrcompile.recipes.recipe import part
from lrcompile.state import State, adapter_set, has_state, state_of


def aux_loss(model: nn.Module) -> Tensor:
    """Σ over the active adapters that train of their method's auxiliary loss, 0-d; zero in evaluation mode and for
    methods without one.

    For a model whose output has a `.loss` (or the key "loss") in training mode it is in there already; add it yourself
    where you compute the loss from something else. With gradient accumulation it belongs into every micro-batch's loss,
    divided as that is. An optimizer of `lrcompile.optimizer` raises at a step to which it did not contribute.

    `model` may be wrapped. Raises `AdapterError` if it has no adapter.
    """
    inner = next((module for module in model.modules() if has_state(module)), model)
    return _aux_loss(inner, state_of(inner))


def _aux_loss(model: nn.Module, state: State) -> Tensor:
    total = torch.zeros((), device=next((p.device for p in model.parameters()), None))
    for name in state.active if model.training else ():
        function = state.aux.get(state.specs[name].method)
        if function is not None and name in state.training:
            adapters = [adapter_set(model, site)[name] for site in state.sites[name]]
            total = total + function(adapters, state.specs[name]).to(total.device)
    if total.requires_grad and torch.compiler.is_compiling():  # a captured graph takes no hooks on tensors within it
        state.aux_used = True
    elif total.requires_grad:
        total.register_hook(partial(_mark, state))
    return total


def _mark(state: State, gradient: Tensor) -> None:
    state.aux_used = True


def hook(model: nn.Module, state: State) -> None:
    """Let the output of `model` carry the auxiliary loss if one of its adapters has one, and nothing otherwise."""
    recipes = [recipe(spec.method) for spec in state.specs.values()]
    state.aux = {each.name: part(each.aux) for each in recipes if each.aux is not None}
    if state.aux and state.aux_hook is None:
        state.aux_hook = model.register_forward_hook(_added, with_kwargs=True)
    elif not state.aux and state.aux_hook is not None:
        state.aux_hook.remove()
        state.aux_hook = None


def _added(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
    """The output, its loss with the auxiliary loss added."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not model.training or not isinstance(loss, Tensor):
        return None
    loss = loss + (_share(model, kwargs) * _aux_loss(model, state_of(model))).to(loss)
    if isinstance(output, dict):
        output["loss"] = loss  # a ModelOutput keeps its attribute in step
        return output
    if isinstance(output, tuple) and hasattr(output, "_replace"):
        return output._replace(loss=loss)
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return dataclasses.replace(output, loss=loss)
    raise AdapterError(
        f"the auxiliary loss cannot be added to the .loss of a {type(output).__name__}; return a dict, a dataclass or a"
        " named tuple"
    )


def _share(model: nn.Module, kwargs: Mapping[str, Any]) -> Any:
    """What part of an optimizer step this batch is.

    `transformers.Trainer` tells a model how many labels the micro-batches of a step have together, and takes the sum of
    their losses: each is divided by that number already. The auxiliary loss is then divided in proportion to labels,
    counted as the Trainer does, so that over the step it counts once. Otherwise each batch has all of it, and whoever
    accumulates divides.
    """
    total, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
    if total is None or labels is None:
        return 1.0
    if kwargs.get("shift_labels") is not None:
        labels = kwargs["shift_labels"]
    elif _shifts(model):
        labels = labels[..., 1:]
    return labels.ne(-100).sum() / total


def _shifts(model: nn.Module) -> bool:
    """Is the loss of this model one of a next token, so that the first label of a sequence counts for nothing?"""
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return LOSS_MAPPING.get(getattr(model, "loss_type", None) or "") is ForCausalLMLoss and not decodes
