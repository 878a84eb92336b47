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
from lrcompile.sites import ADAPTERS
from lrcompile.sites.attention import PACKED
from lrcompile.sites.site import Site
from lrcompile.specs import Spec, pattern_hits
from lrcompile.targeting import ALL_LINEAR, hits

_SEQUENCE_HEADS = ("score", "classifier")


@dataclass(frozen=True)
class Unit:
    """One site as PEFT sees it."""

    site: Site
    by_parameter: bool
    key: str
    """The name PEFT matches rank and alpha patterns against."""


def module_names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if name and ADAPTERS not in name.split(".")]


def as_parameter(site: Site) -> bool:
    """Does PEFT have no module class for this site, so that only `target_parameters` reaches it?"""
    if site.kind in ("linear", "conv1d", "embedding") or (site.kind == "attention" and site.slot == PACKED):
        return False
    return not (site.kind == "graph" and site.slot == "weight" and site.copies is None)


def units(model: nn.Module, config: Mapping[str, Any], found: Iterable[Site]) -> list[Unit]:
    """The sites among `found` that PEFT adapts under `config`."""
    parameters = names_in(config, "target_parameters")
    linear = _all_linear(model, config) if str(config.get("target_modules")).lower() == ALL_LINEAR else None
    hit = lambda name: name in linear if linear is not None else module_hit(config, name)  # noqa: E731
    out = []
    for site in found:
        raw = site.parameter
        parent = site.host.rpartition(".")[0]
        if _ends(raw, parameters):
            out.append(Unit(site, True, raw))
        elif as_parameter(site):
            continue
        elif hit(site.host):
            out.append(Unit(site, False, site.host))
        elif site.host and isinstance(model.get_submodule(parent), nn.MultiheadAttention) and hit(parent):
            out.append(Unit(site, False, parent))
    return out


def module_hit(config: Mapping[str, Any], name: str) -> bool:
    """PEFT's rule for one module name; `layers_to_transform` counts for names matched by suffix only."""
    excluded = config.get("exclude_modules") or ()
    if re.fullmatch(excluded, name) if isinstance(excluded, str) else _ends(name, excluded):
        return False
    if any(re.match(rf"(^|.*\.){saved}($|\..*)", name) for saved in names_in(config, "modules_to_save")):
        return False
    targets = config.get("target_modules") or ()
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    if name in targets:
        return True
    layers = layers_in(config)
    return _ends(name, targets) and (layers is None or _layer(name, names_in(config, "layers_pattern")) in layers)


def rank_and_alpha(config: Mapping[str, Any], unit: Unit) -> tuple[int, float]:
    rank = _first(config.get("rank_pattern") or {}, unit.key, config.get("r", 8))
    return rank, _first(config.get("alpha_pattern") or {}, unit.key, config.get("lora_alpha", 8))


def feeds_forward(config: Mapping[str, Any], unit: Unit) -> bool:
    """Does PEFT's (IA)³ act on the inputs of this layer? It compares ends of names, dots or not."""
    given = config.get("feedforward_modules") or ()
    return bool(re.fullmatch(given, unit.key)) if isinstance(given, str) else unit.key.endswith(tuple(given))


def saved_modules(model: nn.Module, entries: Sequence[str]) -> list[str]:
    """Modules that `modules_to_save` means: PEFT compares ends of names, dots or not."""
    return [name for name in module_names(model) if any(name.endswith(entry) for entry in entries)]


def modules_to_save_for(model: nn.Module, entries: Sequence[str]) -> list[str]:
    """Entries by which PEFT trains what `entries` mean here: to it, "norm" would also mean a "layernorm"."""
    ours = [name for name in module_names(model) if _ends(name, entries)]
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
    forward = [site.host for site in sites if any(hits(spec.options.get("feedforward", ()), n) for n in site.names)]
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
    own = (
        spec.targets
        if isinstance(spec.targets, str)
        else [t for t in spec.targets if any(_ends(name, [t]) for name in every)]
    )
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
        if [name for name in every if module_hit(settings | {"modules_to_save": saved}, name)] == [
            name for name in every if name in set(wanted)
        ]:
            return {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
    return {"exclude_modules": None, "layers_to_transform": None, "target_modules": wanted}


def patterns_for(own: Mapping[str, Any], default: Any, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Patterns that give each name the value `wanted`: `own` if they do and none is idle, else one for each name."""
    idle = [key for key in own if not any(pattern_hits(key, name) for name in wanted)]
    if not idle and all(_first(own, name, default) == value for name, value in wanted.items()):
        return dict(own)
    return {f"^{re.escape(name)}": value for name, value in wanted.items() if value != default}


def _first(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    return next((value for key, value in patterns.items() if pattern_hits(key, name)), default)


def _all_linear(model: nn.Module, config: Mapping[str, Any]) -> set[str]:
    """PEFT's own "all-linear": every nn.Linear and Conv1D but the output layer of a transformers model."""
    from lrcompile.sites.linear import conv1d

    kinds = (nn.Linear, conv1d()) if conv1d() is not None else (nn.Linear,)
    names = {name: module for name, module in model.named_modules() if name in set(module_names(model))}
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    spared = {name for name, module in names.items() if module is head}
    if head is None and callable(get) and config.get("task_type") == "SEQ_CLS":
        spared |= {next((name for name in _SEQUENCE_HEADS if name in names), "")}
    excluded = {"target_modules": r".*"} | {
        k: v for k, v in config.items() if k in ("exclude_modules", "modules_to_save")
    }
    return {
        n for n, module in names.items() if isinstance(module, kinds) and n not in spared and module_hit(excluded, n)
    }


def _ends(name: str, entries: Iterable[str]) -> bool:
    return any(name == entry or name.endswith(f".{entry}") for entry in entries)


def _layer(name: str, patterns: list[str]) -> int | None:
    """The first number in the name that follows one of `patterns` (any name, if none is given)."""
    rules = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(\d+)\."]
    found = next((match for rule in rules if (match := re.match(rule, name))), None)
    return int(found.group(1)) if found else None
