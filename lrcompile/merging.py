"""`merge`: fold active adapters into the weights, measured; `unmerge`: the original bits back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from lrcompile.attaching import detach
from lrcompile.effects import effect_on_outputs
from lrcompile.errors import MergeError
from lrcompile.folding import FoldedSite, fold
from lrcompile.held import take_back
from lrcompile.merge_report import MergeReport as MergeReport
from lrcompile.mergeable import LIMIT, check_data, check_final, check_into, check_limit, chosen_names, erased_message
from lrcompile.observing import Observed
from lrcompile.owners import owners_of_parameters
from lrcompile.progress import shown
from lrcompile.sites.site import Site
from lrcompile.state import State, adapter_set, all_sites, require_settled, state_of
from lrcompile.switching import rewrite_graphs, switched_off
from lrcompile.walking import submodule
from lrcompile.watching import second_moments
from lrcompile.wrapping import refuse_meta, refuse_wrapped


def merge(
    model: nn.Module,
    name: str | None = None,
    *,
    into: str = "keep",
    final: bool = False,
    optimise: bool = False,
    data: Iterable[Any] | None = None,
    limit: float = LIMIT,
) -> MergeReport:
    """W ← cast(W + Δ), Δ = Σ s·B·A or what else the active adapters make of W; in place.

    Formed in float32 (float64 for a float64 base) with one rounding; so is the bias, where an adapter scales it too.
    Folds the active adapters, or the active one called `name`. The original bits stay on the host, so that `unmerge`
    is exact; with `final=True` adapters and kept bits are dropped and a plain model of the original classes is left.

    On an NF4 base `into` must say what the weight becomes: "float32", "bfloat16" or "float16" (dequantized and folded,
    exact but for one rounding), or "nf4": requantized from the kept original weights, or, with `optimise=True`, the
    codes chosen so that the layer's outputs on `data` keep the update (`nf4.rounding`).

    `data`, an iterable of batches as for `apply`, all of which are run: what rounding takes of the update is then
    measured on the outputs of each linear layer instead of its weight. It takes 4·in² bytes of memory a site.

    Raises `MergeError` if something is merged already, nothing is active, or rounding would take more than `limit`
    (`float("inf")`: only measure) of the update at a site, as ‖(W' − W) − Δ‖/‖Δ‖. With `optimise=True` the limit judges
    what the codes are chosen for, and no single site: the model's outputs y on `data`, as ‖y' − y‖/‖y − y₀‖, y₀ without
    the active adapters. A site whose small update is mostly gone may then pass; the report says so. The model is as it
    was after an error.
    """
    refuse_wrapped(model, "merge")
    refuse_meta(model, "merge", MergeError)
    state = state_of(model)
    require_settled(state, "merge")
    names = chosen_names(state, name)
    check_limit(limit)
    chosen = [site for site in all_sites(state) if any(each in adapter_set(model, site) for each in names)]
    check_into(model, chosen, into, optimise)
    check_data(into, optimise, data)
    if final:
        check_final(state, names)
    observed = Observed(model, data) if optimise and data is not None else None
    data = data if observed is None else observed.batches
    moments = {} if data is None else _moments(model, chosen, data)
    before = None if observed is None else _without_and_with(model, observed)
    owners = owners_of_parameters(model)
    rows: list[FoldedSite] = []
    try:
        for site in shown(chosen, "merging", len(chosen)):
            rows.extend(fold(model, state, site, names, into, owners, moments.pop(site.name, None), optimise))
        state.merged = names
        _mark(model, state)
        _untie_config(model, state)
        outputs = None
        if observed is not None and before is not None:
            outputs = effect_on_outputs(*before, observed.outputs("what is kept"))
        report = MergeReport(tuple(rows), names, _notes(state), outputs)
        if not report.adapter_relative_error <= limit:
            raise MergeError(erased_message(report, limit))
    except BaseException:
        _restore(model, state)
        raise
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
    check_final(state, state.merged)
    state.folds, state.merged, state.untied_config = {}, (), False
    state.trained.forget()
    state.residuals = {}
    for name in list(state.specs):
        detach(model, state, name, state.sites[name], {}, ())
    return model


def _notes(state: State) -> tuple[str, ...]:
    parts = [(key, fold) for key, fold in state.folds.items()]
    parts += [(f"{key}.bias", fold.bias) for key, fold in state.folds.items() if fold.bias is not None]
    return tuple(f"{key}: untied from {fold.tied_to}" for key, fold in parts if fold.tied_to)


def _without_and_with(model: nn.Module, observed: Observed) -> tuple[list[Tensor], list[Tensor]]:
    """The model's outputs without and with the active adapters."""
    with switched_off(model):
        base = list(observed.outputs("outputs without adapters"))
    return base, list(observed.outputs("outputs with adapters"))


def _moments(model: nn.Module, chosen: Sequence[Site], data: Iterable[Any]) -> dict[str, Tensor]:
    hosts = {site.name: site.host for site in chosen if site.watchable}
    return second_moments(model, hosts, data, label="what comes into each layer")


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
