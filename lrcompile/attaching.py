"""Putting one adapter into a model, and taking it out: the two halves that `apply`, `load` and `remove` are made of."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from lrcompile import auxiliary, sites
from lrcompile.adapters import RESERVED, AdapterSet, AdapterSlots
from lrcompile.errors import AdapterError, MergeError, SpecError
from lrcompile.hosting import restore, swap
from lrcompile.matching import Matched
from lrcompile.nf4.modules import layout_of, nf4_weight, replace_codes
from lrcompile.progress import shown
from lrcompile.quantizing import is_nf4, quantize
from lrcompile.recipes import recipe
from lrcompile.recipes.forms.adapter import Adapter, Start
from lrcompile.recipes.initialisers.random import generator_of
from lrcompile.recipes.recipe import part
from lrcompile.residuals import base_below, refuse_unfoldable, settle
from lrcompile.sites.bypass import mixin_for
from lrcompile.sites.site import Site
from lrcompile.specs import Spec
from lrcompile.state import State, all_sites, has_state, require_settled, set_state, state_of
from lrcompile.switching import activate, rewrite_graphs, set_training
from lrcompile.written import expect_writes


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
    built = _build(model, spec, matched.hit, measured or {}, started)
    refuse_unfoldable(model, ((start.site, adapter) for adapter, start in built))
    if method.rules:
        for adapter, _ in built:
            adapter.stepped_by_rules_of(method.name)
    if method.quantizes_base and quantize_base:
        _quantize_base(model, spec, built)
    if first:
        state.flags = {key: p.requires_grad for key, p in model.named_parameters()}
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


def detach(
    model: nn.Module, state: State, name: str, hit: Sequence[Site], active: dict[str, float], training: tuple[str, ...]
) -> None:
    """Undo `attach`, whatever part of it was done; `active` and `training` are in force afterwards."""
    state.trained.drop(model, name)
    for site in hit:
        host = model.get_submodule(site.host)
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
        restore(model.get_submodule(swapped), state.swapped.pop(swapped))
    rewrite_graphs(model, hit)
    auxiliary.hook(model, state)
    if state.specs:
        activate(model, active)
        set_training(model, training)
    else:
        settle(model, state)
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(state.flags.get(key, parameter.requires_grad))
        set_state(model, None)


def _refuse_foreign(model: nn.Module) -> None:
    """Two states over one weight would each run its adapters: both times all of them."""
    for name, module in model.named_modules():
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


def _check_baked_dropout(spec: Spec, hit: Sequence[Site]) -> None:
    if spec.dropout and any(site.graph is not None for site in hit):
        raise SpecError(
            "dropout must be 0 on a captured graph: its training flag is fixed when it is captured", field="dropout"
        )


Built = list[tuple[Adapter, Start]]


def _build(model: nn.Module, spec: Spec, hit: Sequence[Site], measured: Mapping[str, Any], started: bool) -> Built:
    """The adapters of all sites, their tensors filled; nothing of the model has changed yet."""
    method = recipe(spec.method)
    if method.form is None:
        return []
    form = part(method.form)
    placed = [_storage(model, spec, site) for site in hit]
    shared = form.share(spec, hit, dtype=placed[0][0], device=placed[0][1])
    built = []
    # a start from singular triplets takes seconds a site
    for site, (dtype, device) in shown(zip(hit, placed, strict=True), f"{spec.method}: starting factors", len(hit)):
        adapter = form.build(spec, site, shared, dtype=dtype, device=device)
        if method.writes_base:
            expect_writes(adapter, device)
        start = Start(
            site,
            spec,
            partial(base_weight, model, site),
            None if device.type == "meta" else generator_of(spec.seed, site.name, device),
            measured.get(site.name),
        )
        if started and device.type != "meta":
            with torch.no_grad():
                adapter.begin(start)
                if method.init is not None:
                    part(method.init)(adapter, start)
                adapter.finish(start)
        built.append((adapter, start))
    return built


def _storage(model: nn.Module, spec: Spec, site: Site) -> tuple[torch.dtype, torch.device]:
    """Dtype and device of an adapter's tensors at `site`."""
    weight = sites.weight_of(model, site) if site.slot in model.get_submodule(site.host)._parameters else None
    device = weight.device if weight is not None else next(model.get_submodule(site.host).buffers()).device
    host = model.get_submodule(site.host)
    own = weight.dtype if weight is not None else layout_of(host).dtype if is_nf4(host) else torch.float32
    wide = torch.promote_types(own, torch.float32)
    return getattr(torch, spec.dtype) if spec.dtype else wide, device


def base_weight(model: nn.Module, site: Site) -> torch.Tensor:
    """The weight of `site` `[..., out, in]` in float32 (float64 for a float64 base), dequantized if need be."""
    host = model.get_submodule(site.host)
    if is_nf4(host):
        return nf4_weight(host, torch.promote_types(layout_of(host).dtype, torch.float32))
    held = base_below(model, site.parameter)
    if held is None:
        weight = sites.weight_of(model, site).detach()
    else:
        weight = (held.mT if site.transposed else held).to(model.get_parameter(site.parameter).device)
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _quantize_base(model: nn.Module, spec: Spec, built: Built) -> None:
    hit = [start.site for _, start in built]
    plain = [
        site.name for site in hit if site.kind in ("linear", "conv1d") and not is_nf4(model.get_submodule(site.host))
    ]
    if left := [site.name for site in hit if site.kind not in ("linear", "conv1d")]:
        raise SpecError(
            f"{spec.method} holds nn.Linear and Conv1D weights in 4 bits, not {', '.join(left[:5])}; exclude them",
            field="targets",
        )
    if plain:
        quantize(
            model,
            "nf4",
            block_size=spec.block_size,
            double_quant=spec.double_quant,
            compute_dtype=spec.compute_dtype,
            keep_base=spec.keep_base,
            targets="|".join(re.escape(each) for each in plain),
        )
    for _, start in built:
        if start.codes is not None:
            replace_codes(model.get_submodule(start.site.host), start.codes)


def stores_otherwise(spec: Spec) -> bool:
    """Does `attach` store base weights in another form, unless told not to?"""
    method = recipe(spec.method)
    return method.quantizes_base or (method.form is not None and part(method.form).holds_weight)


def _place(model: nn.Module, state: State, name: str, built: Built, quantize_base: bool) -> None:
    for adapter, start in built:
        site = start.site
        host = model.get_submodule(site.host)
        if sites.ADAPTERS not in host._modules:
            host.add_module(sites.ADAPTERS, AdapterSlots())
        slots: Any = host._modules[sites.ADAPTERS]
        if site.slot not in slots:
            slots[site.slot] = AdapterSet()
        slots[site.slot].attach(name, adapter)
        adapter.train(host.training)
        mixin = sites.host_mixin(site)
        if mixin is not None:
            _swap(model, state, site.host, mixin)
        for ancestor in _ancestors(site.host):
            if bypass := mixin_for(model.get_submodule(ancestor)):
                _swap(model, state, ancestor, bypass)
        if quantize_base:
            adapter.placed(host)


def _swap(model: nn.Module, state: State, name: str, mixin: type) -> None:
    if name not in state.swapped:
        swap(model.get_submodule(name), mixin)
        state.swapped[name] = mixin


def _ancestors(name: str) -> list[str]:
    parts = name.split(".") if name else []
    return ["", *(".".join(parts[: end + 1]) for end in range(len(parts)))]
