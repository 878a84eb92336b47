"""A PEFT adapter beside a model of ours: the sites it means there, and the spec that means the same."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from lrcompile import sites
from lrcompile.errors import AdapterError, SpecError
from lrcompile.interop.peft_config import names_in, numbers_from_peft, settings_of, targets_from_peft
from lrcompile.interop.peft_matching import (
    Unit,
    feeds_forward,
    module_names,
    patterns_for,
    ranks_and_alphas,
    saved_modules,
    units,
)
from lrcompile.matching import Matched, match
from lrcompile.names import endings, meant
from lrcompile.specs import Spec


def fitted(model: nn.Module, config: Mapping[str, Any]) -> tuple[Spec, list[Unit], Matched]:
    """The spec under which `model` gets exactly the sites, ranks and scales that PEFT would give it under `config`.

    The config's own words where they mean the same here, otherwise the sites by name. Raises `SpecError` for settings
    without counterpart, `AdapterError` for targets that cannot be adapted here.
    """
    data = settings_of(config)
    fields = numbers_from_peft(data, trained=True)
    Spec.from_dict(fields)  # a number out of range is complained of before any is used
    adapted = units(model, data, sites.find(model))
    if not adapted:
        raise AdapterError(f"its targets hit nothing in this {type(model).__name__}")
    if refused := [unit.site for unit in adapted if unit.site.refusal]:
        raise AdapterError("; ".join(f"{site.name} cannot be adapted: {site.refusal}" for site in refused[:8]))
    names = [unit.site.name for unit in adapted]
    fields["train_modules"] = _train_modules(model, fields["train_modules"])
    if "rank_pattern" in fields:
        numbers = ranks_and_alphas(data, adapted)
        ranks = {name: rank for name, (rank, _) in numbers.items()}
        alphas = {name: alpha for name, (_, alpha) in numbers.items()}
        fields["rank_pattern"] = patterns_for(fields["rank_pattern"], fields["rank"], ranks)
        fields["alpha_pattern"] = patterns_for(fields["alpha_pattern"], fields["alpha"], alphas)
    if "feedforward" in fields:
        fields["feedforward"] = tuple(unit.site.name for unit in adapted if feeds_forward(data, unit))
    for targets in (
        _own_targets,
        lambda _: {"targets": tuple(names)},
        lambda _: {"targets": "|".join(map(re.escape, names))},
    ):
        found = _matched(model, fields, data, targets, names)
        if found is not None:
            spec, matched = found
            by_name = {unit.site.name: unit for unit in adapted}
            return spec, [by_name[site.name] for site in matched.hit], matched
    raise AdapterError(f"no spec means exactly these sites: {', '.join(names[:8])}")


def by_parameter(config: Mapping[str, Any], hit: Sequence[sites.Site]) -> list[Unit]:
    """Units of sites known already: the config says only which PEFT reaches by `target_parameters`."""
    parameters = names_in(config, "target_parameters")
    chosen = meant(parameters, [site.parameter for site in hit])
    raw = [(site, site.parameter in chosen) for site in hit]
    return [Unit(site, chosen, site.parameter if chosen else site.host) for site, chosen in raw]


def _matched(
    model: nn.Module,
    fields: dict[str, Any],
    data: Mapping[str, Any],
    targets: Callable[[Mapping[str, Any]], dict[str, Any]],
    names: list[str],
) -> tuple[Spec, Matched] | None:
    """The spec and what it matches, if that is just the sites called `names`."""
    try:
        spec = Spec.from_dict(fields | targets(data))
        matched = match(model, spec, allow_high_rank=True)
    except SpecError:
        return None  # these words mean something else here, or nothing; the next candidate is tried
    return (spec, matched) if {site.name for site in matched.hit} == set(names) else None


def _own_targets(data: Mapping[str, Any]) -> dict[str, Any]:
    return targets_from_peft(data)


def _train_modules(model: nn.Module, entries: Sequence[str]) -> tuple[str, ...]:
    """`modules_to_save` without names that hit nothing here, spelled out where PEFT's rule hits more than ours."""
    theirs = saved_modules(model, entries)
    there = {ending for name in theirs for ending in endings(name)}
    kept = tuple(entry for entry in entries if entry in there)
    return kept if meant(kept, module_names(model)) == set(theirs) else tuple(theirs)
