"""Weights that hold only what an adapter leaves of them: W − Σ wᵢ·sᵢ·B₀ᵢ·A₀ᵢ, over the active adapters that fold.

It follows from the base's bits and the adapters' own tensors, so it is formed anew whenever other adapters become
active and never stored; what is kept, on the host, are the base's bits. The parameter object stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lrcompile.errors import AdapterError, SpecError
from lrcompile.owners import owners_of_parameters
from lrcompile.recipes import recipe
from lrcompile.recipes.forms.adapter import Adapter
from lrcompile.sites.site import Site
from lrcompile.state import State, adapter_set, all_sites, has_state, state_of
from lrcompile.wording import listed


def settle(model: nn.Module, state: State) -> None:
    """Let every weight hold what the adapters active now leave of it: its own bits where none folds. Idempotent."""
    folding: dict[str, tuple[Site, list[Adapter]]] = {}
    for site in all_sites(state):
        adapters = adapter_set(model, site)
        if live := [adapters[name] for name in adapters.active if adapters[name].folded]:
            folding[site.parameter] = (site, live)
    for name in [name for name in state.residuals if name not in folding]:
        parameter = model.get_parameter(name)
        parameter.data = state.residuals.pop(name).to(parameter)
    for name, (site, live) in folding.items():
        parameter = model.get_parameter(name)
        base = state.residuals.setdefault(name, parameter.data.cpu())
        parameter.data = _left(site, base.to(parameter.device), live).to(parameter.dtype)
    _watch_loads(model, bool(folding))


def base_below(model: nn.Module, parameter: str) -> Tensor | None:
    """The base's bits of a parameter that holds a residual now, on the host; None where it holds its own."""
    return state_of(model).residuals.get(parameter) if has_state(model) else None


def refuse_beside_residuals(model: nn.Module, state: State, names: Iterable[str]) -> None:
    """Raise `AdapterError` if one of these adapters writes or reads a weight that another has taken its part off: what
    is written would be lost with the residual, and what is read is not the base.
    """
    folding: dict[str, str] = {}
    using: dict[str, tuple[str, str]] = {}
    for name in names:
        writes = recipe(state.specs[name].method).writes_base
        for site in state.sites[name]:
            adapter = adapter_set(model, site)[name]
            if adapter.folded:
                folding[site.parameter] = name
            elif writes or adapter.reads_weight:
                using[site.parameter] = (name, "writes" if writes else "reads")
    for parameter in [parameter for parameter in using if parameter in folding]:
        (name, does), other = using[parameter], folding[parameter]
        raise AdapterError(
            f"adapter {name!r} {does} {parameter!r}, which holds only what adapter {other!r} leaves of it, so they"
            f" cannot be active together; apply {other!r} with residual='keep'"
        )


def notes_of(model: nn.Module) -> list[str]:
    """That the model's own tensors are not the base's now."""
    names = list(state_of(model).residuals)
    if not names:
        return []
    return [
        f"{len(names)} weights hold what the active adapters leave of them, and so does `state_dict` ({listed(names)});"
        " the base's bits wait in host memory (lrcompile.disabled, activate and remove put them back)"
    ]


def refuse_unfoldable(model: nn.Module, adapted: Iterable[tuple[Site, Adapter]]) -> None:
    """Raise `SpecError` where a residual cannot take the place of the weight."""
    folding = [site for site, adapter in adapted if adapter.folded]
    owners = owners_of_parameters(model) if folding else {}
    for site in folding:
        weight = model.get_parameter(site.parameter)
        if others := [name for name in owners[id(weight)] if name != site.parameter]:
            raise SpecError(
                f"residual='fold' takes a part off the weight of {site.name!r}, which {', '.join(others)} would lose"
                " with it; use residual='keep', or exclude the site",
                field="residual",
            )
        if weight.is_meta:
            raise SpecError(
                f"residual='fold' needs the values of {site.name!r}, which is on the meta device; load them first, or"
                " use residual='keep'",
                field="residual",
            )


def _left(site: Site, base: Tensor, live: Sequence[Adapter]) -> Tensor:
    weight = base.to(torch.promote_types(base.dtype, torch.float32))
    with torch.no_grad():
        for adapter in live:
            offset = adapter.offset(weight.dtype)
            weight = weight - (offset.mT if site.transposed else offset)
    return weight.contiguous()


def _watch_loads(model: nn.Module, wanted: bool) -> None:
    """A `load_state_dict` may bring other offsets than the weights have given up, or weights of another base."""
    before: dict[int, Any] = model._load_state_dict_pre_hooks
    after: dict[int, Any] = model._load_state_dict_post_hooks
    ours = [(before, key) for key, hook in before.items() if getattr(hook, "hook", None) is _before_load]
    ours += [(after, key) for key, hook in after.items() if hook is _after_load]
    if wanted and not ours:
        model.register_load_state_dict_pre_hook(_before_load)
        model.register_load_state_dict_post_hook(_after_load)
    for hooks, key in ours if not wanted else ():
        del hooks[key]


def _before_load(model: nn.Module, tensors: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    if has_state(model):
        state = state_of(model)
        state.reloaded = tuple(name for name in state.residuals if prefix + name in tensors)


def _after_load(model: nn.Module, _: Any) -> None:
    if not has_state(model) or state_of(model).merged:
        return
    state = state_of(model)
    loaded, state.reloaded = {name: model.get_parameter(name).data for name in state.reloaded}, ()
    settle(model, state)
    foreign = [
        name
        for name, value in loaded.items()
        if not (_near(value, model.get_parameter(name).data) or torch.equal(value.cpu(), state.residuals[name]))
    ]
    if foreign:
        raise AdapterError(
            f"the state dict brought {listed(foreign)}, which are neither the weights of the base that the adapter was"
            " applied to nor what the adapter leaves of them. Load the weights of that base into the model first, then"
            " apply, then load the state dict"
        )


def _near(value: Tensor, expected: Tensor) -> bool:
    """Equal but for the order in which another machine adds up."""
    largest = torch.maximum(value.abs().max(), expected.abs().max())
    return bool((value - expected).abs().max() <= 8 * torch.finfo(value.dtype).eps * largest)
