"""Ranks padded to one maximum in compiled graphs, so that an adapter of another rank takes the place of the first."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lrcompile.errors import AdapterError
from lrcompile.recipes.forms.adapter import Adapter
from lrcompile.recipes.forms.pair import LoraAdapter
from lrcompile.state import State, adapter_set, state_of


def pad(model: nn.Module, max_rank: int | None) -> None:
    """From now on graphs compute with factors of `max_rank`, zeros beyond an adapter's own rank (None: as they are).

    Raises `AdapterError` if an active adapter has a larger rank.
    """
    state = state_of(model)
    refuse_wider(model, state, state.active, max_rank)
    state.max_rank = max_rank
    for name, sites in state.sites.items():
        for site in sites:
            widen(adapter_set(model, site)[name], max_rank)


def widen(adapter: Adapter, max_rank: int | None) -> None:
    """Let graphs pad this adapter's factors, if they are the tensors it holds: others are computed, at their rank."""
    if adapter.width != max_rank and pads(adapter):
        adapter.width = max_rank


def pads(adapter: Adapter) -> bool:
    return isinstance(adapter, LoraAdapter) and type(adapter).factors is LoraAdapter.factors


def refuse_wider(model: nn.Module, state: State, names: Iterable[str], max_rank: int | None) -> None:
    """Raise `AdapterError` if one of these adapters does not fit into `max_rank`."""
    if max_rank is None:
        return
    for name in names:
        for site in state.sites[name]:
            adapter = adapter_set(model, site)[name]
            if adapter.rank > max_rank and pads(adapter):
                raise AdapterError(
                    f"adapter {name!r} has rank {adapter.rank} at {site.name}, and the model is compiled for"
                    f" max_rank={max_rank}; compile it for more, lrcompile.compile(model, max_rank={adapter.rank})"
                )
