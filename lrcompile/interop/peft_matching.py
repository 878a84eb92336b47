"""Which sites of a model PEFT would adapt under a config; and the config under which it adapts given sites.

PEFT takes a site by its module (`target_modules`) or by its raw parameter (`target_parameters`).
`nn.MultiheadAttention` as a module is two sites here, its packed projection and `out_proj`.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lrcompile.interop.peft_config import layers_in, names_in
from lrcompile.names import Patterns, beginnings, endings, is_name, meant
from lrcompile.sites.attention import PACKED
from lrcompile.sites.site import Site
from lrcompile.specs import Spec
from lrcompile.targeting import ALL_LINEAR
from lrcompile.walking import modules, submodule

_SEQUENCE_HEADS = ("score", "classifier")


@dataclass(frozen=True)
class Unit:
    """One site as PEFT sees it."""

    site: Site
    by_parameter: bool
    key: str
    """The name PEFT matches rank and alpha patterns against."""


def module_names(model: nn.Module) -> list[str]:
    return [name for name, _ in modules(model, adapters=False) if name]


def as_parameter(site: Site) -> bool:
    """Does PEFT have no module class for this site, so that only `target_parameters` reaches it?"""
    if site.kind in ("linear", "conv1d", "embedding") or (site.kind == "attention" and site.slot == PACKED):
        return False
    return not (site.kind == "graph" and site.slot == "weight" and site.copies is None)


def units(model: nn.Module, config: Mapping[str, Any], found: Iterable[Site]) -> list[Unit]:
    """The sites among `found` that PEFT adapts under `config`."""
    found = list(found)
    parents = {site.host: site.host.rpartition(".")[0] for site in found}
    raw = meant(names_in(config, "target_parameters"), [site.parameter for site in found])
    if str(config.get("target_modules")).lower() == ALL_LINEAR:
        hit = _all_linear(model, config)
    else:
        hit = modules_hit(config, {*parents, *parents.values()})
    out = []
    for site in found:
        parent = parents[site.host]
        if site.parameter in raw:
            out.append(Unit(site, True, site.parameter))
        elif as_parameter(site):
            continue
        elif site.host in hit:
            out.append(Unit(site, False, site.host))
        elif site.host and parent in hit and isinstance(submodule(model, parent), nn.MultiheadAttention):
            out.append(Unit(site, False, parent))
    return out


def modules_hit(config: Mapping[str, Any], names: Iterable[str]) -> set[str]:
    """PEFT's rule for names of modules; `layers_to_transform` counts for names matched by suffix only."""
    names = list(names)
    out = meant(config.get("exclude_modules") or (), names) | _saved(names_in(config, "modules_to_save"), names)
    targets = config.get("target_modules") or ()
    found = meant(targets, names) - out
    layers = None if isinstance(targets, str) else layers_in(config)
    if layers is None:
        return found
    whole, patterns = frozenset(targets), names_in(config, "layers_pattern")
    return {name for name in found if name in whole or _layer(name, patterns) in layers}


def _saved(entries: Sequence[str], names: Sequence[str]) -> set[str]:
    """Modules that are one of `modules_to_save` or lie in one: PEFT puts each entry into a regular expression."""
    plain = Patterns(entry for entry in entries if is_name(entry))
    others = [re.compile(rf"(^|.*\.){entry}($|\..*)") for entry in entries if not is_name(entry)]
    return {
        name
        for name in names
        if any(plain.hitting(each) for each in beginnings(name)) or any(other.match(name) for other in others)
    }


def ranks_and_alphas(config: Mapping[str, Any], adapted: Iterable[Unit]) -> dict[str, tuple[int, float]]:
    """By name of the site."""
    names = {unit.site.name: unit.key for unit in adapted}
    ranks = _values(config.get("rank_pattern") or {}, names.values(), config.get("r", 8))
    alphas = _values(config.get("alpha_pattern") or {}, names.values(), config.get("lora_alpha", 8))
    return {name: (ranks[key], alphas[key]) for name, key in names.items()}


def feeds_forward(config: Mapping[str, Any], unit: Unit) -> bool:
    """Does PEFT's (IA)³ act on the inputs of this layer? It compares ends of names, dots or not."""
    given = config.get("feedforward_modules") or ()
    return bool(re.fullmatch(given, unit.key)) if isinstance(given, str) else unit.key.endswith(tuple(given))


def saved_modules(model: nn.Module, entries: Sequence[str]) -> list[str]:
    """Modules that `modules_to_save` means: PEFT compares ends of names, dots or not."""
    return [name for name in module_names(model) if name.endswith(tuple(entries))]


def modules_to_save_for(model: nn.Module, entries: Sequence[str]) -> list[str]:
    """Entries by which PEFT trains what `entries` mean here: to it, "norm" would also mean a "layernorm"."""
    if not entries:
        return []
    hit = meant(entries, every := module_names(model))
    ours = [name for name in every if name in hit]
    return list(entries) if saved_modules(model, entries) == ours else ours


def targets_for(model: nn.Module, spec: Spec, sites: Sequence[Site], known: Container[str]) -> dict[str, Any]:
    """The settings of PEFT under which it adapts exactly these `sites` of `model`, with the ranks and scales of `spec`.

    The spec's own targets where they mean the same to PEFT; else last names, whole names, or a regular expression,
    whichever is exact. Of the settings only those that are `known` to the PEFT type.
    """
    whole = _whole_attentions(spec, sites)
    by_module, parameters, numbers = [], [], {}
    for site in sites:
        parent = site.host.rpartition(".")[0]
        if as_parameter(site) or (site.kind == "attention" and site.host not in whole):
            key = site.parameter
            parameters.append(key)
        else:
            key = parent if parent in whole and site.host == f"{parent}.out_proj" else site.host
            by_module.append(key)
        numbers[key] = (spec.rank_of(site.name), spec.alpha_of(site.name))
    wanted = list(dict.fromkeys(by_module))
    saved = modules_to_save_for(model, spec.train_modules)
    settings = _module_settings(model, spec, wanted, saved) | {"modules_to_save": saved or None}
    settings["target_parameters"] = parameters or None
    settings["rank_pattern"] = patterns_for(
        spec.rank_pattern, spec.rank, {key: rank for key, (rank, _) in numbers.items()}
    )
    settings["alpha_pattern"] = patterns_for(
        spec.alpha_pattern, spec.alpha, {key: alpha for key, (_, alpha) in numbers.items()}
    )
    settings["fan_in_fan_out"] = not parameters and all(site.kind == "conv1d" for site in sites)
    if parameters:
        # PEFT refuses dropout beside target_parameters; what was trained with stands in lrcompile.json
        settings["lora_dropout"] = 0.0
    feeding = meant(spec.options.get("feedforward", ()), [name for site in sites for name in site.names])
    forward = [site.host for site in sites if not feeding.isdisjoint(site.names)]
    settings["feedforward_modules"] = "|".join(map(re.escape, forward)) if forward else []
    return {key: value for key, value in settings.items() if key in known or key == "fan_in_fan_out"}


def _whole_attentions(spec: Spec, sites: Sequence[Site]) -> set[str]:
    """Attentions whose two sites are adapted alike: only these are a module that PEFT can name."""
    named = {site.name for site in sites}
    alike = lambda a, b: (spec.rank_of(a), spec.alpha_of(a)) == (spec.rank_of(b), spec.alpha_of(b))  # noqa: E731
    hosts = [site.host for site in sites if site.kind == "attention" and site.slot == PACKED]
    return {host for host in hosts if f"{host}.out_proj" in named and alike(f"{host}.{PACKED}", f"{host}.out_proj")}


def _module_settings(model: nn.Module, spec: Spec, wanted: list[str], saved: list[str]) -> dict[str, Any]:
    every = module_names(model)
    there = {ending for name in every for ending in endings(name)}
    own = spec.targets if isinstance(spec.targets, str) else [target for target in spec.targets if target in there]
    candidates: list[dict[str, Any]] = [
        {"target_modules": own, "exclude_modules": spec.exclude or None, "layers_to_transform": spec.layers},
        {"target_modules": sorted({name.rpartition(".")[2] for name in wanted})},
        {"target_modules": wanted},
        {"target_modules": "|".join(map(re.escape, wanted))},
    ]
    for settings in candidates:
        settings = {"exclude_modules": None, "layers_to_transform": None} | settings
        targets = settings["target_modules"]
        if (isinstance(targets, str) and targets.lower() == ALL_LINEAR) or (
            isinstance(targets, str) and settings["layers_to_transform"]
        ):
            continue
        if modules_hit(settings | {"modules_to_save": saved}, every) == set(wanted).intersection(every):
            return {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
    return {"exclude_modules": None, "layers_to_transform": None, "target_modules": wanted}


def patterns_for(own: Mapping[str, Any], default: Any, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Patterns that give each name the value `wanted`: `own` if they do and none is idle, else one for each name."""
    if not Patterns(own).idle(wanted) and _values(own, wanted, default) == wanted:
        return dict(own)
    return {f"^{re.escape(name)}": value for name, value in wanted.items() if value != default}


def _values(patterns: Mapping[str, Any], names: Iterable[str], default: Any) -> dict[str, Any]:
    """By name: what the first pattern gives that hits it."""
    keys = Patterns(patterns)
    return {name: next((patterns[key] for key in keys.hitting(name)), default) for name in names}


def _all_linear(model: nn.Module, config: Mapping[str, Any]) -> set[str]:
    """PEFT's own "all-linear": every nn.Linear and Conv1D but the output layer of a transformers model."""
    from lrcompile.sites.linear import conv1d

    kinds = (nn.Linear, conv1d()) if conv1d() is not None else (nn.Linear,)
    names = {name: module for name, module in modules(model, adapters=False) if name}
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    spared = {name for name, module in names.items() if module is head}
    if head is None and callable(get) and config.get("task_type") == "SEQ_CLS":
        spared |= {next((name for name in _SEQUENCE_HEADS if name in names), "")}
    excluded = {"target_modules": r".*"} | {
        k: v for k, v in config.items() if k in ("exclude_modules", "modules_to_save")
    }
    return modules_hit(
        excluded, [name for name, module in names.items() if isinstance(module, kinds) and name not in spared]
    )


def _layer(name: str, patterns: list[str]) -> int | None:
    """The first number in the name that follows one of `patterns` (any name, if none is given)."""
    rules = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(\d+)\."]
    found = next((match for rule in rules if (match := re.match(rule, name))), None)
    return int(found.group(1)) if found else None
