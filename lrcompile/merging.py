"""`merge`: fold active adapters into the weights, measured; `unmerge`: the original bits back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lrcompile.attaching import detach
from lrcompile.errors import MergeError
from lrcompile.folding import FoldedSite, fold
from lrcompile.held import take_back
from lrcompile.nf4.modules import is_nf4, layout_of
from lrcompile.owners import owners_of_parameters
from lrcompile.quantizing import base_of
from lrcompile.sites.site import Site
from lrcompile.state import State, adapter_set, all_sites, require_name, require_settled, state_of
from lrcompile.switching import rewrite_graphs
from lrcompile.tables import render
from lrcompile.walking import submodule
from lrcompile.wrapping import refuse_meta, refuse_wrapped

LOSS_LIMIT = 0.5
"""Largest adapter-relative error a merge accepts: beyond it rounding has taken more than half of the update."""

_INTO = ("keep", "float32", "bfloat16", "float16", "nf4")


@dataclass(frozen=True)
class MergeReport:
    """What a merge did to each weight and bias; prints as a table."""

    sites: tuple[FoldedSite, ...]
    adapters: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def worst(self) -> FoldedSite | None:
        """None where the adapter is only parameters of the base, which are in place already."""
        return max(self.sites, key=lambda site: site.adapter_relative_error, default=None)

    @property
    def adapter_relative_error(self) -> float:
        return 0.0 if self.worst is None else self.worst.adapter_relative_error

    def to_dict(self) -> dict[str, Any]:
        return {
            "adapters": list(self.adapters),
            "notes": list(self.notes),
            "sites": [vars(site) for site in self.sites],
        }

    def __str__(self) -> str:
        rows = [(s.name, s.dtype, f"{s.relative_size:.2e}", f"{s.adapter_relative_error:.2e}") for s in self.sites]
        title = f"merged {', '.join(self.adapters)}: "
        if self.worst is None:
            return title + "no weight has an update; what trained in full is in place"
        title += f"worst adapter-relative error {self.adapter_relative_error:.2e} at {self.worst.name}"
        return render(("site", "dtype", "‖Δ‖/‖W‖", "error/‖Δ‖"), rows, title=title, notes=self.notes)


def merge(model: nn.Module, name: str | None = None, *, into: str = "keep", final: bool = False) -> MergeReport:
    """W ← cast(W + Δ), Δ = Σ s·B·A or what else the active adapters make of W; in place.

    Formed in float32 (float64 for a float64 base) with one rounding; so is the bias, where an adapter scales it too.
    Folds the active adapters, or the active one called `name`. The original bits stay on the host, so that `unmerge`
    is exact; with `final=True` adapters and kept bits are dropped and a plain model of the original classes is left.
    On an NF4 base `into` must say what the weight becomes: "float32", "bfloat16" or "float16" (dequantized and folded,
    exact but for one rounding), or "nf4" (requantized from the kept original weights, with the loss measured).

    Raises `MergeError` if something is merged already, nothing is active, or rounding would take more than half of the
    update at a site (the model is then as it was).
    """
    refuse_wrapped(model, "merge")
    refuse_meta(model, "merge", MergeError)
    state = state_of(model)
    require_settled(state, "merge")
    names = _names(state, name)
    if into not in _INTO:
        raise MergeError(f"into={into!r} is not valid: choose one of {', '.join(map(repr, _INTO))}")
    chosen = [site for site in all_sites(state) if any(each in adapter_set(model, site) for each in names)]
    _check_into(model, chosen, into)
    if final:
        _check_final(state, names)
    owners = owners_of_parameters(model)
    rows: list[FoldedSite] = []
    try:
        for site in chosen:
            rows.extend(fold(model, state, site, names, into, owners))
        if erased := [row for row in rows if row.adapter_relative_error > LOSS_LIMIT]:
            raise MergeError(_erased_message(erased))
    except BaseException:
        _restore(model, state)
        raise
    state.merged = names
    _mark(model, state)
    _untie_config(model, state)
    parts = [(key, fold) for key, fold in state.folds.items()]
    parts += [(f"{key}.bias", fold.bias) for key, fold in state.folds.items() if fold.bias is not None]
    notes = tuple(f"{key}: untied from {fold.tied_to}" for key, fold in parts if fold.tied_to)
    report = MergeReport(tuple(rows), names, notes)
    if final:
        finalize(model)
    return report


def unmerge(model: nn.Module) -> nn.Module:
    """Put the original bits of every weight back; the adapters act beside them again."""
    state = state_of(model)
    require_settled(state, "unmerge")
    if not state.merged:
        raise MergeError("the model is not merged")
    _restore(model, state)
    return model


def finalize(model: nn.Module) -> nn.Module:
    """Drop adapters, kept bits and generated classes: what is left is a plain model that computes what the merged one
    does.
    """
    state = state_of(model)
    _check_final(state, state.merged)
    state.folds, state.merged, state.untied_config = {}, (), False
    state.trained.forget()
    state.residuals = {}
    for name in list(state.specs):
        detach(model, state, name, state.sites[name], {}, ())
    return model


def _check_final(state: State, merged: Sequence[str]) -> None:
    if left := [name for name in state.active if name not in merged]:
        raise MergeError(
            f"adapter {left[0]!r} is active but not merged; merge all active adapters, or deactivate it, before"
            " final=True"
        )


def _names(state: State, name: str | None) -> tuple[str, ...]:
    if state.merged:
        raise MergeError(f"{', '.join(map(repr, state.merged))} is merged already; call lrcompile.unmerge(model) first")
    if name is not None:
        require_name(state, name)
        if name not in state.active:
            raise MergeError(f"adapter {name!r} is not active; call lrcompile.activate(model, {name!r}) first")
        return (name,)
    if not state.active:
        raise MergeError("no adapter is active, so there is nothing to merge; call lrcompile.activate first")
    return tuple(state.active)


def _check_into(model: nn.Module, chosen: Sequence[Site], into: str) -> None:
    hosts = {site.name: submodule(model, site.host) for site in chosen}
    quantized = {name: host for name, host in hosts.items() if is_nf4(host)}
    if not quantized:
        if into != "keep":
            raise MergeError(f"into={into!r} is for an NF4 base, and no merged weight is quantized: leave it out")
        return
    name = next(iter(quantized))
    if into == "keep":
        raise MergeError(
            f"{name!r} (of {len(quantized)} such sites) holds NF4 codes, on which a small update would round away:"
            " 2-3 % of it survives."
            ' Keep the pair beside the base (export with adapters="inline": exact), or give into="bfloat16" or'
            ' "float32" (dequantize and fold), or into="nf4" on a base quantized with keep_base="cpu" (requantizes'
            " W + Δ; the loss is measured)."
        )
    if into == "nf4":
        if lost := [each for each, host in quantized.items() if base_of(host) is None]:
            raise MergeError(
                f'into="nf4" requantizes from the original weights, and those of {lost[0]!r} were not kept; quantize'
                ' with keep_base="cpu"'
            )
        return
    asked = getattr(torch, into)
    if wrong := [each for each, host in quantized.items() if layout_of(host).dtype != asked]:
        dtype = str(layout_of(hosts[wrong[0]]).dtype).removeprefix("torch.")
        raise MergeError(
            f"{wrong[0]!r} computes on {dtype} activations, so a plain {into} weight would not fit them; give"
            f" into={dtype!r}, or cast the model first (model.to(torch.{into}))"
        )


def _erased_message(erased: Sequence[FoldedSite]) -> str:
    worst = max(erased, key=lambda row: row.adapter_relative_error)
    return (
        f"rounding to {worst.dtype} would take {worst.adapter_relative_error:.0%} of the update at {worst.name!r}"
        f" (and more than half at {len(erased)} sites in all), whose size is {worst.relative_size:.1e} of the weight's."
        " Merge a float32 copy (model.float()), or keep the adapter beside the base."
    )


def _restore(model: nn.Module, state: State) -> None:
    for site in all_sites(state):
        fold = state.folds.get(site.name)
        if fold is None:
            continue
        host = submodule(model, site.host)
        take_back(host, site.slot, fold)
        if fold.bias is not None:
            take_back(host, "bias", fold.bias)
    state.trained.hidden = {}
    state.folds, state.merged = {}, ()
    if state.untied_config:
        model.config.tie_word_embeddings = True  # type: ignore[union-attr]
        state.untied_config = False
    _mark(model, state)


def _mark(model: nn.Module, state: State) -> None:
    for site in all_sites(state):
        adapter_set(model, site).merged = state.merged
    rewrite_graphs(model, all_sites(state))


def _untie_config(model: nn.Module, state: State) -> None:
    """A checkpoint of the merged model must not be tied again on load."""
    config = getattr(model, "config", None)
    if any(fold.tied_to for fold in state.folds.values()) and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False  # type: ignore[union-attr]
        state.untied_config = True
