"""Which base weights an adapter's training has written (PeriodicLoRA after an unload, GaLore after a step).

Adapters of a method that writes its base carry a persistent boolean `written`, so that copies, checkpoints of the model
and resumed runs know it too. Below a written weight the base is gone: `disabled` and a plain `remove` refuse. Not so
where the written values came with a load, which keeps the base's bits (`trained.Trained`).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from lrcompile.errors import AdapterError
from lrcompile.state import adapter_set, require_name, state_of
from lrcompile.wording import listed

FLAG = "written"
"""What the boolean is called among an adapter's tensors."""


def expect_writes(adapter: nn.Module, device: torch.device) -> None:
    """Give a new adapter the flag: its method writes the base, and has not yet."""
    adapter.register_buffer(FLAG, torch.zeros((), dtype=torch.bool, device=device))


def mark_written(model: nn.Module, name: str, parameters: Iterable[str]) -> None:
    """The adapter `name` has written these base parameters (qualified names, each the weight of one of its sites)."""
    state = state_of(model)
    require_name(state, name)
    sites = {site.parameter: site for site in state.sites[name]}
    for parameter in parameters:
        flag = adapter_set(model, sites[parameter])[name]._buffers.get(FLAG) if parameter in sites else None
        if flag is None:
            raise AdapterError(f"{parameter!r} is no weight that adapter {name!r} ({state.specs[name].method}) writes")
        flag.fill_(True)


def written_by(model: nn.Module, name: str) -> tuple[str, ...]:
    """The base parameters that the adapter `name` has written so far."""
    state = state_of(model)
    require_name(state, name)
    flags = {site.parameter: adapter_set(model, site)[name]._buffers.get(FLAG) for site in state.sites[name]}
    return tuple(parameter for parameter, flag in flags.items() if flag is not None and not flag.is_meta and bool(flag))


def lost_to(model: nn.Module, name: str) -> tuple[str, ...]:
    """Those of `written_by` whose old bits are not kept."""
    kept = state_of(model).trained.written.get(name, frozenset())
    return tuple(parameter for parameter in written_by(model, name) if parameter not in kept)


def notes_of(model: nn.Module) -> list[str]:
    """One line for each adapter that has written its base."""
    written = {name: lost_to(model, name) for name in state_of(model).specs}
    return [
        f"adapter {name!r} has written {len(parameters)} base weights ({listed(parameters)}): they are no longer what"
        " the model came with, and other adapters act on what they hold now"
        for name, parameters in written.items()
        if parameters
    ]


def removal_notes(model: nn.Module, names: Iterable[str]) -> list[str]:
    """What is to be remembered once these adapters are gone."""
    written = {name: lost_to(model, name) for name in names}
    return [
        f"adapter {name!r} wrote {len(parameters)} base weights before it was removed: {listed(parameters)}"
        for name, parameters in written.items()
        if parameters
    ]


def refuse_written(model: nn.Module, names: Iterable[str], doing: str) -> None:
    """Raise `AdapterError` if one of these adapters has written base weights, whose old bits are not kept."""
    state = state_of(model)
    for name in names:
        if parameters := lost_to(model, name):
            raise AdapterError(
                f"cannot {doing}: training adapter {name!r} ({state.specs[name].method}) has written"
                f" {len(parameters)} base weights, and what they held before is not kept: {listed(parameters)}."
                " Load the base again for its values, or lrcompile.remove(model, name, keep_trained_weights=True) to"
                " take the adapter out and leave the weights as they were trained"
            )
