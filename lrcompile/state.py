"""What lrcompile knows of a model it has adapted: plain data beside the model, by qualified names, so that copies stay
whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lrcompile.adapters import AdapterSet
from lrcompile.errors import AdapterError
from lrcompile.held import Fold
from lrcompile.hosting import Host
from lrcompile.sites import ADAPTERS
from lrcompile.sites.site import Site
from lrcompile.specs import Spec
from lrcompile.trained import Trained
from lrcompile.walking import modules, parameters, submodule

_ATTRIBUTE = "_lrcompile"


@dataclass
class State:
    specs: dict[str, Spec] = field(default_factory=dict)
    sites: dict[str, tuple[Site, ...]] = field(default_factory=dict)
    """By adapter name."""
    spared: dict[str, tuple[tuple[Site, str], ...]] = field(default_factory=dict)
    """By adapter name: sites left alone, and why."""
    active: dict[str, float] = field(default_factory=dict)
    training: tuple[str, ...] = ()
    flags: dict[str, bool] = field(default_factory=dict)
    """`requires_grad` of every base parameter before the first `apply`."""
    swapped: dict[str, type[Host]] = field(default_factory=dict)
    """Modules whose class is swapped, and for what."""
    trained: Trained = field(default_factory=Trained)
    residuals: dict[str, Tensor] = field(default_factory=dict)
    """The base's bits of each parameter that holds what active adapters leave of it (`residuals.settle`), on the host.
    """
    reloaded: tuple[str, ...] = ()
    """Those of them that a `load_state_dict` under way brings."""
    folds: dict[str, Fold] = field(default_factory=dict)
    """By site name, while merged."""
    merged: tuple[str, ...] = ()
    untied_config: bool = False
    dead: tuple[str, ...] | None = None
    """Tensors no gradient reached; None as long as nobody looked."""
    notes: list[str] = field(default_factory=list)
    aux: dict[str, Any] = field(default_factory=dict)
    """The auxiliary losses in use, by method."""
    aux_used: bool = False
    """Has a backward pass gone through the auxiliary loss since the last optimizer step?"""
    aux_hook: RemovableHandle | None = None
    """What adds it to the model's output."""
    max_rank: int | None = None
    """What compiled graphs pad the ranks of adapters to (None: they do not)."""
    suspended: int = 0
    """How many `disabled` blocks are open."""


def state_of(model: nn.Module) -> State:
    """The state of `model`, or an `AdapterError` saying that it has none."""
    if not isinstance(model, nn.Module):
        raise AdapterError(f"expected a torch.nn.Module with an adapter, got {type(model).__name__}")
    found = model.__dict__.get(_ATTRIBUTE)
    if found is None:
        inner = [name for name, module in modules(model) if _ATTRIBUTE in module.__dict__]
        hint = (
            f"; its submodule {inner[0]!r} has one: pass that"
            if inner
            else "; call lrcompile.apply or lrcompile.load first"
        )
        raise AdapterError(f"this {type(model).__name__} has no adapter{hint}")
    return found


def acting(model: nn.Module) -> dict[str, float]:
    """The adapters that act now, with their weights: none in a model that has none, or within `disabled`."""
    found = model.__dict__.get(_ATTRIBUTE)
    return dict(found.active) if found is not None and not found.suspended else {}


def has_state(model: nn.Module) -> bool:
    return _ATTRIBUTE in model.__dict__


def set_state(model: nn.Module, state: State | None) -> None:
    if state is None:
        model.__dict__.pop(_ATTRIBUTE, None)
    else:
        model.__dict__[_ATTRIBUTE] = state


def adapter_set(model: nn.Module, site: Site) -> AdapterSet:
    slots: Any = submodule(model, site.host)._modules[ADAPTERS]
    return slots[site.slot]


def all_sites(state: State) -> list[Site]:
    """Every adapted site once, in the order the adapters were added."""
    return list({site.name: site for sites in state.sites.values() for site in sites}.values())


def adapter_tensors(model: nn.Module, state: State, name: str) -> Iterator[tuple[str, nn.Parameter]]:
    """The factors of the adapter `name` with their qualified names."""
    for site in state.sites[name]:
        yield from tensors_at(model, site, name)


def tensors_at(model: nn.Module, site: Site, name: str) -> list[tuple[str, nn.Parameter]]:
    prefix = f"{site.host}." if site.host else ""
    own = parameters(adapter_set(model, site)[name])
    return [(f"{prefix}{ADAPTERS}.{site.slot}.{name}.{local}", tensor) for local, tensor in own]


def require_name(state: State, name: str) -> None:
    if name not in state.specs:
        raise AdapterError(f"there is no adapter {name!r}; there are: {', '.join(map(repr, state.specs))}")


def require_settled(state: State, doing: str) -> None:
    """Refuse to change what an open `disabled` block will put back when it ends."""
    if state.suspended:
        raise AdapterError(f"{doing} within lrcompile.disabled(model): leave the block first")
