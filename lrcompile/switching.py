"""Which adapters act, with what weight, and which train."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import fx, nn

from lrcompile.errors import AdapterError, MergeError
from lrcompile.held import Held, exchange
from lrcompile.padding import refuse_wider
from lrcompile.recipes import recipe
from lrcompile.residuals import refuse_beside_residuals, settle
from lrcompile.sites.graph_rule import insert_adapters
from lrcompile.sites.site import Site
from lrcompile.state import adapter_set, adapter_tensors, all_sites, require_name, require_settled, state_of
from lrcompile.walking import parameters, submodule
from lrcompile.wrapping import within
from lrcompile.written import refuse_written


def activate(
    model: nn.Module, adapters: str | Iterable[str] | Mapping[str, float], *, train: str | Iterable[str] | None = None
) -> nn.Module:
    """y = xWᵀ + b + Σ wᵢ·sᵢ·(xAᵢᵀ)Bᵢᵀ over the named adapters (weight 1 where none is given); all others are inactive.

    Each acts on the base as it is now, also where training another has written it (`report` says so). `train` names the
    adapters that train from now on (None: as before). Raises `AdapterError` for an unknown name or a weight that
    is no finite number, `MergeError` while merged.
    """
    given, model = model, within(model)
    state = state_of(model)
    require_settled(state, "activate")
    chosen = _weights(adapters)
    learning = None if train is None else tuple(_weights(train))
    for name, weight in chosen.items():
        require_name(state, name)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise AdapterError(f"the weight of adapter {name!r} must be a finite number, got {weight!r}")
    for name in learning or ():
        require_name(state, name)
    if state.merged:
        raise MergeError("the model is merged; call lrcompile.unmerge(model) before changing which adapters are active")
    refuse_wider(model, state, chosen, state.max_rank)
    refuse_beside_residuals(model, state, chosen)
    state.trained.show(model, chosen)
    state.active = chosen
    for site in all_sites(state):
        adapters_here = adapter_set(model, site)
        adapters_here.active = tuple(name for name in chosen if name in adapters_here)
        for name in adapters_here.active:
            adapter = adapters_here[name]
            if adapter.weight != chosen[name]:
                adapter.weight = chosen[name]
                adapter.refill_scale()
    settle(model, state)
    rewrite_graphs(model, all_sites(state))
    if learning is not None:
        set_training(model, learning)
    return given


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the model computes the base's values, to the bit; also while merged.

    Raises `AdapterError` if training has written the base itself (`plora` after an unload, `galore` after a step).
    """
    inner = within(model)
    refuse_written(inner, state_of(inner).specs, "compute the base's values")
    with switched_off(inner):
        yield model


@contextmanager
def switched_off(model: nn.Module) -> Iterator[nn.Module]:
    """As `disabled`, but on what the base holds now, whoever wrote it."""
    state = state_of(model)
    sets = [adapter_set(model, site) for site in all_sites(state)]
    before = [adapters.active for adapters in sets]
    shown = list(dict.fromkeys(state.trained.in_place.values()))
    folded = [(site, state.folds[site.name]) for site in all_sites(state) if site.name in state.folds]
    merged: list[tuple[nn.Module, str, Held]] = []
    state.suspended += 1
    try:
        for site, fold in folded:
            host = submodule(model, site.host)
            merged.append((host, site.slot, exchange(host, site.slot, fold.base)))
            if fold.bias is not None:
                merged.append((host, "bias", exchange(host, "bias", fold.bias.base)))
        for adapters in sets:
            adapters.active = ()
        state.trained.show(model, ())
        settle(model, state)
        rewrite_graphs(model, all_sites(state))
        yield model
    finally:
        state.suspended -= 1
        for adapters, active in zip(sets, before, strict=True):
            adapters.active = active
        state.trained.show(model, shown)
        settle(model, state)
        for host, slot, held in merged:
            exchange(host, slot, held)
        rewrite_graphs(model, all_sites(state))


def set_training(model: nn.Module, names: tuple[str, ...]) -> None:
    """Let exactly these adapters train, and nothing of the base but what they train in full."""
    state = state_of(model)
    for name in names:
        require_name(state, name)
    state.training = names
    for _, parameter in parameters(model, adapters=False):
        if parameter.requires_grad:
            parameter.requires_grad_(False)
    for name in state.specs:
        trains = recipe(state.specs[name].method).trains if name in names else ()
        for key, tensor in adapter_tensors(model, state, name):
            tensor.requires_grad_(key.rpartition(".")[2] in trains)
    for name in names:
        for key in state.trained.names_of(name):
            model.get_parameter(key).requires_grad_(True)


def _weights(adapters: str | Iterable[str] | Mapping[str, float]) -> dict[str, float]:
    if isinstance(adapters, str):
        return {adapters: 1.0}
    if not isinstance(adapters, Iterable):
        raise AdapterError(f"expected the name of an adapter, several, or a mapping to weights, got {adapters!r}")
    return dict(adapters) if isinstance(adapters, Mapping) else dict.fromkeys(adapters, 1.0)


def rewrite_graphs(model: nn.Module, sites: Iterable[Site]) -> None:
    """Bring the graph modules of these sites in line with the adapters that are live."""
    for name in {site.graph for site in sites if site.graph is not None}:
        module = model.get_submodule(name)
        assert isinstance(module, fx.GraphModule)
        insert_adapters(module.graph, module)
        module.recompile()
