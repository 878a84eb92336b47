"""What an optimizer's state belongs to, in one string that its `state_dict` carries: resuming with something else fails
by name instead of by shape, or not at all.
"""

from __future__ import annotations

import json
from typing import Any

from torch import nn

from lrcompile.state import state_of


def identity(model: nn.Module) -> str:
    """Of every adapter that trains: its method and options, rank and scale at each site, what trains in full. As JSON,
    since a checkpoint may flatten parameter groups to plain values.
    """
    state = state_of(model)
    found = {}
    for name in state.training:
        spec = state.specs[name]
        sites = {site.name: [spec.rank_of(site.name), spec.scale_of(site.name)] for site in state.sites[name]}
        trained = sorted(state.trained.names_of(name))
        found[name] = {"method": spec.method, **spec.options, "sites": sites, "trained": trained}
    return json.dumps(found, sort_keys=True)


def difference(saved: str, now: str) -> str | None:
    """In words, the first thing in which two identities differ."""
    if saved == now:
        return None
    return _first("", json.loads(saved), json.loads(now))


def _first(path: str, saved: Any, now: Any) -> str | None:
    if isinstance(saved, dict) and isinstance(now, dict):
        for key in [*saved, *(key for key in now if key not in saved)]:
            where = f"{path} {key}".strip()
            if key not in now:
                return f"{where} is in the saved state only"
            if key not in saved:
                return f"{where} is in this model only"
            if found := _first(where, saved[key], now[key]):
                return found
        return None
    return None if saved == now else f"{path} was {saved!r} when saved and is {now!r} now"
