"""`to_lora`: an adapter of any method as plain LoRA that computes the same, exactly where its update is low-rank."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrcompile.building import base_weight
from lrcompile.errors import AdapterError, SpecError
from lrcompile.factoring import Pair, compressed, contributing, factored
from lrcompile.folding import bias_of
from lrcompile.plain_specs import plain_spec
from lrcompile.recipes import recipe
from lrcompile.recipes.forms.adapter import Adapter
from lrcompile.recipes.forms.pair import LoraAdapter, LowRank
from lrcompile.sites.site import Site
from lrcompile.specs import Spec
from lrcompile.state import State, adapter_set, require_name, require_settled, state_of
from lrcompile.switching import activate, set_training
from lrcompile.tables import render
from lrcompile.walking import submodule
from lrcompile.wording import listed
from lrcompile.wrapping import refuse_meta, refuse_wrapped


@dataclass(frozen=True)
class ConvertedSite:
    name: str
    before: int
    """The rank of the adapter that was here."""
    rank: int
    scale: float
    relative_error: float
    """‖Δ' − Δ‖ / ‖Δ‖; 0 where the factors are the very ones the adapter used, or Δ is 0."""


@dataclass(frozen=True)
class Conversion:
    """What `to_lora` did at each site; prints as a table."""

    adapter: str
    method: str
    """What it was."""
    sites: tuple[ConvertedSite, ...]
    notes: tuple[str, ...]

    @property
    def relative_error(self) -> float:
        return max(site.relative_error for site in self.sites)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        rows = [(s.name, s.before, s.rank, f"{s.scale:.6g}", f"{s.relative_error:.2e}") for s in self.sites]
        how = "exactly" if self.relative_error == 0 else f"with a relative error of up to {self.relative_error:.2e}"
        title = f"adapter {self.adapter!r}: {self.method} is now lora, {how}"
        return render(("site", "rank was", "rank", "scale", "error/‖Δ‖"), rows, title=title, notes=self.notes)


def to_lora(model: nn.Module, name: str | None = None, *, rank: int | None = None, uniform: bool = False) -> Conversion:
    """Δ = s·B'·A'  for the adapter `name` (None: the only, or the only active one), as a plain `lora` adapter of that
    name; in place.

    Exact for every method whose update is low-rank: its effective factors become A `[r', in]` and B `[out, r']` (of
    PiSSA, OLoRA and LoRA-GA those of rank 2r beside the weight as it was before `apply`), ranks that contribute
    nothing are dropped, and each site keeps its scale s. A larger r' than `rank`, and the update of any other method
    (DoRA, HiRA, (IA)³), is cut to its `rank` largest singular triplets, with the relative error in the report.
    Weights of activation, dropout, what trains and parameters trained in full stay; tensors that sites share become
    each site's own. `lrcompile.save` then writes PEFT's LORA. An optimizer made before holds the old tensors: make a
    new one.

    `uniform` gives every site one rank, that of the widest, by zeros, and the scale 1 by multiplying B: for programs
    that read PEFT's folder with one `r` and one `lora_alpha` and take no notice of `rank_pattern`, `alpha_pattern` or,
    some of them, `use_rslora` (vLLM, llama.cpp). It refuses parameters trained in full, which they do not load.

    Raises `AdapterError` for what has no counterpart: a method without an adapter or one that writes the base, a
    changed bias, a merged, wrapped or meta model; or where `rank` is needed and not given. The model is then as it
    was.
    """
    refuse_wrapped(model, "convert an adapter of")
    state = state_of(model)
    require_settled(state, "to_lora")
    refuse_meta(model, "convert an adapter", AdapterError)
    name = chosen_adapter(state, name)
    _check(model, state, name, rank)
    if uniform and (full := state.trained.names_of(name)):
        raise AdapterError(
            f"{listed(full)} trained in full beside the adapter, which a folder of one rank and one scale is not for:"
            " merge the adapter instead (lrcompile.merge), or convert without uniform"
        )
    spec, sites = state.specs[name], state.sites[name]
    olds = [adapter_set(model, site)[name] for site in sites]
    with torch.no_grad():
        pairs = [_pair(model, site, old, rank) for site, old in zip(sites, olds, strict=True)]
        if any(contributing(pair).any() for pair in pairs):  # else nothing is learned yet, and any rank may
            pairs = [pair.kept(contributing(pair)) for pair in pairs]
        if uniform:
            pairs = [pair.uniform(max(each.rank for each in pairs)) for pair in pairs]
        plain = plain_spec(model, spec, sites, pairs)
        news = [_adapter(plain, site, old, pair) for site, old, pair in zip(sites, olds, pairs, strict=True)]
    for site, new in zip(sites, news, strict=True):
        adapter_set(model, site)._modules[name] = new
    state.specs[name], state.dead = plain, None
    activate(model, dict(state.active))
    set_training(model, state.training)
    rows = (
        ConvertedSite(site.name, old.rank, new.rank, new.scale_value, pair.error)
        for site, old, new, pair in zip(sites, olds, news, pairs, strict=True)
    )
    return Conversion(name, spec.method, tuple(rows), _notes(spec))


def chosen_adapter(state: State, name: str | None) -> str:
    """The adapter that `name` means: None is the only, or the only active one."""
    if state.merged:
        raise AdapterError(f"{', '.join(map(repr, state.merged))} is merged; call lrcompile.unmerge(model) first")
    if name is not None:
        require_name(state, name)
        return name
    candidates = list(state.specs) if len(state.specs) == 1 else list(state.active)
    if len(candidates) != 1:
        raise AdapterError(f"which adapter? Give its name, one of {', '.join(map(repr, state.specs))}")
    return candidates[0]


def _check(model: nn.Module, state: State, name: str, rank: int | None) -> None:
    method = recipe(state.specs[name].method)
    if isinstance(rank, bool) or not (rank is None or (isinstance(rank, int) and rank >= 1)):
        raise SpecError(f"rank must be an integer of at least 1, or None, got {rank!r}", field="rank")
    if method.form is None:
        raise AdapterError(f"{method.name} trains parameters of the base itself, so there is nothing to convert")
    if method.writes_base:
        raise AdapterError(
            f"{method.name} writes the base weights while it trains, so its adapter is not all of what it learned: save"
            " the model itself, which lrcompile.merge(model, final=True) leaves plain"
        )
    adapters = {site.name: adapter_set(model, site)[name] for site in state.sites[name]}
    if changed := [site.name for site in state.sites[name] if _changes_bias(model, site, adapters[site.name])]:
        raise AdapterError(f"{method.name} changes the bias of {listed(changed)}, which LoRA cannot; merge it instead")
    if full := [each for each, adapter in adapters.items() if _factors(adapter) is None]:
        if rank is None:
            raise AdapterError(
                f"the update of {method.name} is not of low rank (at {listed(full)}): give rank=, to which its"
                " largest singular triplets are kept, and find the error in the report"
            )
        if state.active.get(name, 1.0) != 1:
            raise AdapterError(
                f"{name!r} is active with weight {state.active[name]}, in which the update of {method.name} is not"
                f" linear; call lrcompile.activate(model, {name!r}) first"
            )


def _changes_bias(model: nn.Module, site: Site, adapter: Adapter) -> bool:
    bias = bias_of(submodule(model, site.host), site)
    if type(adapter).bias_change is Adapter.bias_change:
        return False  # and no weight need be dequantized to find out
    with torch.no_grad():
        return bias is not None and adapter.bias_change(bias, bias, base_weight(model, site)) is not None


def _factors(adapter: Adapter) -> tuple[Tensor, Tensor] | None:
    return adapter.beside_base() if isinstance(adapter, LowRank) else None


def _pair(model: nn.Module, site: Site, adapter: Adapter, rank: int | None) -> Pair:
    if (factors := _factors(adapter)) is not None:
        pair = Pair(*factors, adapter.scale_value)
        return pair if rank is None or pair.rank <= rank else compressed(pair, rank)
    assert rank is not None  # `_check` asked
    weight = base_weight(model, site)
    dtype = next(adapter.parameters()).dtype
    return factored(adapter.change(weight, weight), rank, dtype)


def _adapter(spec: Spec, site: Site, old: Adapter, pair: Pair) -> LoraAdapter:
    new = LoraAdapter(
        site.in_features,
        site.out_features,
        pair.rank,
        spec.scale_of(site.name),
        dropout=old.dropout,
        copies=site.copies,
        dtype=pair.A.dtype,
        device=pair.A.device,
    )
    new.A.copy_(pair.A)
    new.B.copy_(pair.B)
    new.weight = old.weight
    new.refill_scale()
    return new.train(old.training)


def _notes(spec: Spec) -> tuple[str, ...]:
    if not recipe(spec.method).quantizes_base:
        return ()
    return ("the factors belong to this model's NF4 codes: save the quantized base with them",)
