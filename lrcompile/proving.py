"""The proof `apply(…, example_inputs=…)` asks for: every adapter is reached, gets a gradient, and merges to the same
function.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lrcompile.errors import AdapterError, TargetError
from lrcompile.folding import bias_of, changes
from lrcompile.held import Fold, Held, put, take_back
from lrcompile.liveness import PATIENCE, dead_message, dead_names, drops_layers
from lrcompile.owners import owners_of_parameters
from lrcompile.recipes.forms.adapter import Adapter
from lrcompile.sites.site import Site
from lrcompile.state import adapter_set, adapter_tensors, state_of
from lrcompile.undisturbed import set_mode, undisturbed
from lrcompile.walking import submodule


def prove(model: nn.Module, name: str, example_inputs: Any) -> None:
    """Raise `TargetError` naming the sites where the adapter `name` does not act exactly as its weight does.

    B is random while the proof runs (zero would prove nothing) and restored afterwards, as are gradients, modes and
    random state.
    """
    state = state_of(model)
    with _probing(model, name):
        _require_fitting(model, example_inputs)
        set_mode(model, True)
        for seed in range(PATIENCE if drops_layers(model) else 1):
            _run(model, example_inputs, backward=True, seed=seed)
            dead = state.dead = tuple(dead_names(model))
            if not dead:
                break
        else:
            raise TargetError(dead_message(dead))
        set_mode(model, False)
        if not state.sites[name]:
            return  # nothing but parameters of the base, which have no other place to act
        if state.sites[name][0].graph is None and any(
            "weight_codes" in submodule(model, s.host)._buffers for s in state.sites[name]
        ):
            return  # an NF4 weight cannot be folded without saying into what
        if bad := _bypassed(model, name, example_inputs):
            listed = "\n".join(f"  {site.name}" for site in bad)
            raise TargetError(
                f"merging changes what the model computes, so the weight is also used past its adapter,"
                f" at:\n{listed}\nExclude these sites."
            )


def _require_fitting(model: nn.Module, example_inputs: Any) -> None:
    """Tell inputs that the model does not take apart from an adapter that does not act."""
    set_mode(model, False)
    try:
        _run(model, example_inputs)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
        raise AdapterError(
            f"{type(model).__name__} cannot be run on example_inputs ({type(error).__name__}: {error}); give a dict of"
            " keyword arguments or a tuple of positional ones that it takes"
        ) from error


def _bypassed(model: nn.Module, name: str, example_inputs: Any) -> list[Site]:
    """Sites whose merged weight computes something else than weight and adapter, each tried alone if all together
    disagree.
    """
    state = state_of(model)
    plain = _run(model, example_inputs)
    for _ in range(10):
        if all(bool(torch.isfinite(value).all()) for value in plain):
            break
        with torch.no_grad():  # large beside the weights, as it should be, but too large for this dtype and depth
            for _, tensor in adapter_tensors(model, state, name):
                tensor.mul_(0.25)
        plain = _run(model, example_inputs)
    if _agree(model, name, state.sites[name], plain, example_inputs):
        return []
    return [site for site in state.sites[name] if not _agree(model, name, (site,), plain, example_inputs)]


def _agree(model: nn.Module, name: str, chosen: tuple[Site, ...], plain: list[Tensor], example_inputs: Any) -> bool:
    """Is the change by folding these sites small beside the change by switching them off?"""
    from lrcompile.switching import rewrite_graphs

    sets = [adapter_set(model, site) for site in chosen]
    before = [adapters.active for adapters in sets]
    weights = [model.get_parameter(site.parameter) for site in chosen]
    owners = owners_of_parameters(model)
    folded: list[tuple[nn.Module, str, Fold]] = []
    try:
        for adapters in sets:
            adapters.active = tuple(other for other in adapters.active if other != name)
        rewrite_graphs(model, chosen)
        off = _run(model, example_inputs)
        for site, adapters in zip(chosen, sets, strict=True):
            folded += _folded(submodule(model, site.host), site, adapters[name], owners)
        merged = _run(model, example_inputs)
    finally:
        for host, slot, fold in folded:
            take_back(host, slot, fold)
        for adapters, active in zip(sets, before, strict=True):
            adapters.active = active
        rewrite_graphs(model, chosen)
    error = sum(float((a.double() - b.double()).norm()) for a, b in zip(plain, merged, strict=True))
    effect = sum(float((a.double() - b.double()).norm()) for a, b in zip(plain, off, strict=True))
    rounding = max((torch.finfo(weight.dtype).eps for weight in weights), default=0.0)
    size = sum(float(value.double().norm()) for value in plain)
    return error <= 0.1 * effect + 64 * rounding * size


def _folded(
    host: nn.Module, site: Site, adapter: Adapter, owners: dict[int, list[str]]
) -> Iterator[tuple[nn.Module, str, Fold]]:
    """Put what a merge would make of them in the place of the weight at `site` and the bias beside it."""
    weight, bias = host._parameters[site.slot], bias_of(host, site)
    assert weight is not None
    wide = torch.promote_types(weight.dtype, torch.float32)
    start = weight.detach().to(wide)
    base = start.mT if site.transposed else start
    delta, shift = changes([adapter], base, None if bias is None else bias.detach().to(wide))
    parts = [(site.slot, weight, start + (delta.mT if site.transposed else delta))]
    if bias is not None and shift is not None:
        parts.append(("bias", bias, bias.detach().to(wide) + shift))
    for slot, parameter, value in parts:
        others = owners[id(parameter)][1:]  # as `merge`: what else shares it keeps its values
        yield host, slot, put(host, slot, Held(data=value.to(parameter.dtype)), others)


@contextmanager
def _probing(model: nn.Module, name: str) -> Iterator[None]:
    factors = [(tensor, tensor.detach().clone()) for _, tensor in adapter_tensors(model, state_of(model), name)]
    with undisturbed(model, seed=0):
        try:
            with torch.no_grad():
                for tensor, _ in factors:
                    tensor.normal_(0, tensor.shape[-1] ** -0.5)
            yield
        finally:
            with torch.no_grad():
                for tensor, value in factors:
                    tensor.copy_(value)
            state_of(model).aux_used = False


def _run(model: nn.Module, example_inputs: Any, *, backward: bool = False, seed: int = 0) -> list[Tensor]:
    inputs = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), example_inputs)
    with torch.set_grad_enabled(backward), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        out = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
        floats = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point()]
        if backward:
            wanted = [t for t in floats if t.requires_grad]
            if wanted:
                torch.autograd.backward(wanted, [torch.randn_like(t) for t in wanted])
    return floats
