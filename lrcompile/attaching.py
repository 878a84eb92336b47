"""Putting one adapter into a model, and taking it out: the two halves that `apply`, `load` and `remove` are made of."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lrcompile import auxiliary, sites
from lrcompile.adapters import RESERVED, AdapterSet, AdapterSlots
from lrcompile.building import Built, build, make_base_nf4
from lrcompile.errors import AdapterError, MergeError, SpecError
from lrcompile.hosting import restore, swap
from lrcompile.matching import Matched
from lrcompile.names import beginnings
from lrcompile.padding import widen
from lrcompile.recipes import recipe
from lrcompile.recipes.recipe import part
from lrcompile.residuals import refuse_unfoldable, settle
from lrcompile.sites.bypass import mixin_for
from lrcompile.sites.site import Site
from lrcompile.specs import Spec
from lrcompile.state import State, all_sites, has_state, require_settled, set_state, state_of
from lrcompile.switching import activate, rewrite_graphs, set_training
from lrcompile.walking import modules, parameters, submodule
from lrcompile.wording import listed


def attach(
    model: nn.Module,
    spec: Spec,
    name: str,
    matched: Matched,
    *,
    trainable: bool = True,
    quantize_base: bool = True,
    measured: Mapping[str, Any] | None = None,
    started: bool = True,
) -> None:
    """Add the adapter `name` at the matched sites and make it the active one; all of it or nothing.

    `quantize_base` False leaves a float base float, whatever the method would make of it. `measured`: by site name,
    what the method's calibration found. `started` False leaves the tensors for the caller to fill.
    """
    require_attachable(model, spec, name, matched)
    first = not has_state(model)
    state = State() if first else state_of(model)
    method = recipe(spec.method)
    built = build(model, spec, matched.hit, measured or {}, started)
    refuse_unfoldable(model, ((start.site, adapter) for adapter, start in built))
    if method.rules:
        for adapter, _ in built:
            adapter.stepped_by_rules_of(method.name)
    if method.quantizes_base and quantize_base:
        make_base_nf4(model, spec, built)
    if first:
        state.flags = {key: p.requires_grad for key, p in parameters(model)}
        set_state(model, state)
    before = (dict(state.active), state.training)
    try:
        _place(model, state, name, built, quantize_base)
        state.specs[name], state.sites[name], state.spared[name] = spec, matched.hit, matched.spared
        state.trained.add(model, name, matched.trained)
        state.notes += [note for note in matched.notes if note not in state.notes]
        state.dead = None
        activate(model, name)
        set_training(model, (name,) if trainable else before[1])
        auxiliary.hook(model, state)
    except BaseException:
        detach(model, state, name, matched.hit, *before)
        raise


def require_attachable(model: nn.Module, spec: Spec, name: str, matched: Matched) -> None:
    """Raise what `attach` would for a model that cannot take this adapter now; for callers with long work before it."""
    state = state_of(model) if has_state(model) else State()
    require_settled(state, "apply")
    if not has_state(model):
        _refuse_foreign(model)
    _check_name(state, name)
    if state.merged:
        raise MergeError(f"adapter {state.merged[0]!r} is merged into the weights; call lrcompile.unmerge(model) first")
    _check_baked_dropout(spec, matched.hit)
    _check_sole_holder(state, spec, matched.hit)


def detach(
    model: nn.Module, state: State, name: str, hit: Sequence[Site], active: dict[str, float], training: tuple[str, ...]
) -> None:
    """Undo `attach`, whatever part of it was done; `active` and `training` are in force afterwards."""
    state.trained.drop(model, name)
    for site in hit:
        host = submodule(model, site.host)
        slots: Any = host._modules.get(sites.ADAPTERS)
        if slots is None or site.slot not in slots:
            continue
        if name in slots[site.slot]:
            slots[site.slot][name].removed(host)
            slots[site.slot].detach(name)
        if not len(slots[site.slot]):
            del slots[site.slot]
        if not len(slots):
            del host._modules[sites.ADAPTERS]
    for record in (state.specs, state.sites, state.spared):
        record.pop(name, None)
    left = [site.host for site in all_sites(state)]
    needed = {ancestor for host in left for ancestor in _ancestors(host)}
    for swapped in [each for each in state.swapped if each not in needed]:
        restore(submodule(model, swapped), state.swapped.pop(swapped))
    rewrite_graphs(model, hit)
    auxiliary.hook(model, state)
    if state.specs:
        activate(model, active)
        set_training(model, training)
    else:
        settle(model, state)
        for key, parameter in parameters(model):
            parameter.requires_grad_(state.flags.get(key, parameter.requires_grad))
        set_state(model, None)


def _refuse_foreign(model: nn.Module) -> None:
    """Two states over one weight would each run its adapters: both times all of them."""
    for name, module in modules(model):
        if isinstance(module, AdapterSlots):
            host = name.removesuffix(sites.ADAPTERS).rstrip(".") or "this module"
            raise AdapterError(
                f"{host} carries an adapter that was applied to another model (a part of this one, a whole around it or"
                " the original of a copied graph); apply to that model, or lrcompile.remove(it) first"
            )


def _check_name(state: State, name: str) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) or name in RESERVED:
        raise AdapterError(
            f"adapter name {name!r}: use letters, digits, _ and -, starting with a letter or digit, and no attribute"
            " of nn.Module"
        )
    if name in state.specs:
        raise AdapterError(
            f"an adapter named {name!r} is applied already; give another name=, or lrcompile.remove(model, {name!r})"
            " first"
        )


def _check_sole_holder(state: State, spec: Spec, hit: Sequence[Site]) -> None:
    """Other adapters read the weight of their host, which one that holds it takes away."""
    form = recipe(spec.method).form
    if form is None or not part(form).holds_weight:
        return
    wanted = {site.name for site in hit}
    for other, sites_of_other in state.sites.items():
        if shared := [site.name for site in sites_of_other if site.name in wanted]:
            raise AdapterError(
                f"{spec.method} holds the weight itself, so no other adapter can be at its sites, and {other!r}"
                f" ({state.specs[other].method}) is at {listed(shared)}; lrcompile.remove(model, {other!r}), or"
                " lrcompile.merge(model, final=True), first"
            )


def _check_baked_dropout(spec: Spec, hit: Sequence[Site]) -> None:
    if spec.dropout and any(site.graph is not None for site in hit):
        raise SpecError(
            "dropout must be 0 on a captured graph: its training flag is fixed when it is captured", field="dropout"
        )


def _place(model: nn.Module, state: State, name: str, built: Built, quantize_base: bool) -> None:
    passed: set[str] = set()
    for adapter, start in built:
        site = start.site
        host = submodule(model, site.host)
        slots: Any = host._modules.get(sites.ADAPTERS)
        if slots is None:
            slots = host._modules[sites.ADAPTERS] = AdapterSlots()
        if site.slot not in slots:
            slots[site.slot] = AdapterSet()
        slots[site.slot].attach(name, adapter)
        widen(adapter, state.max_rank)
        if adapter.training is not host.training:
            adapter.train(host.training)
        mixin = sites.host_mixin(site)
        if mixin is not None:
            _swap(model, state, site.host, mixin)
        for ancestor in _ancestors(site.host):
            if ancestor in passed:
                continue
            passed.add(ancestor)
            if bypass := mixin_for(submodule(model, ancestor)):
                _swap(model, state, ancestor, bypass)
        if quantize_base:
            adapter.placed(host)


def _swap(model: nn.Module, state: State, name: str, mixin: type) -> None:
    if name not in state.swapped:
        swap(submodule(model, name), mixin)
        state.swapped[name] = mixin


def _ancestors(name: str) -> list[str]:
    return ["", *beginnings(name)] if name else [""]
