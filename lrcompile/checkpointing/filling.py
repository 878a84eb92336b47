"""Attaching an adapter with given values, also in the place of another; the model is as before if anything fails."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from lrcompile.adapting import remove
from lrcompile.attaching import attach, detach
from lrcompile.checkpointing.plans import Plan
from lrcompile.recipes.forms.adapter import Adapter
from lrcompile.residuals import settle
from lrcompile.state import State, adapter_set, has_state, state_of
from lrcompile.switching import rewrite_graphs

T = TypeVar("T")


def attach_filled(
    model: nn.Module,
    plan: Plan,
    name: str,
    values: Mapping[str, Mapping[str, Tensor]],
    tensors: Mapping[str, Tensor],
    trainable: bool,
) -> None:
    """Attach beside what is there, fill, and only then take the place of an adapter of the same name.

    `values`: by site name, the tensors of its adapter; `tensors`: the file's, by key.
    """
    old = state_of(model) if has_state(model) else None
    before = (dict(old.active), old.training) if old is not None else ({}, ())
    taken = old is not None and name in old.specs
    fresh = _free_name(old, name) if taken else name
    attach(model, plan.spec, fresh, plan.matched, trainable=trainable, started=False)
    state = state_of(model)
    try:
        placed: dict[str, Tensor] = {}
        for place in plan.places:
            site = place.unit.site
            _fill(adapter_set(model, site)[fresh], values[site.name], place.keys, placed)
        for key, parameter in plan.trained.items():
            state.trained.write(model, fresh, parameter, tensors[key])
        state.trained.add_written(model, fresh, [site.parameter for site in plan.written.values()])
        state.trained.show(model, state.active)
        for key, site in plan.written.items():
            state.trained.write(model, fresh, site.parameter, tensors[key])
        settle(model, state)
    except BaseException:
        detach(model, state, fresh, plan.matched.hit, *before)
        raise
    if taken:
        remove(model, name)
        _rename(model, state, fresh, name)
    state.notes += [note for note in plan.notes if note not in state.notes]


def _fill(adapter: Adapter, values: Mapping[str, Tensor], keys: Mapping[str, str], placed: dict[str, Tensor]) -> None:
    """Give every tensor of `adapter` its value; what is `placed` under its key already is the same object here."""
    for name in adapter.state_dict(keep_vars=True):
        owner, _, local = name.rpartition(".")
        module = adapter.get_submodule(owner)
        own: dict[str, Any] = module._parameters if local in module._parameters else module._buffers
        held, key = own[local], keys[name]
        if key in placed:
            own[local] = placed[key]
        elif isinstance(held, nn.Parameter):
            held.data = values[name]
            placed[key] = held
        else:
            own[local] = placed[key] = values[name]
    adapter.refresh()
    adapter.refill_scale()


def _free_name(state: State | None, name: str) -> str:
    while state is not None and name in state.specs:
        name += "-"
    return name


def _rename(model: nn.Module, state: State, old: str, new: str) -> None:
    for site in state.sites[old]:
        adapters = adapter_set(model, site)
        adapters._modules[new] = adapters._modules.pop(old)
        adapters.active = tuple(new if each == old else each for each in adapters.active)
    _move(state.specs, old, new)
    _move(state.sites, old, new)
    _move(state.spared, old, new)
    _move(state.active, old, new)
    _move(state.trained.values, old, new)
    _move(state.trained.written, old, new)
    state.training = tuple(new if each == old else each for each in state.training)
    state.trained.in_place = {key: new if each == old else each for key, each in state.trained.in_place.items()}
    rewrite_graphs(model, state.sites[new])


def _move(record: dict[str, T], old: str, new: str) -> None:
    if old in record:
        record[new] = record.pop(old)
