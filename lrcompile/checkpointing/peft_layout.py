"""Adapters that a type of PEFT's can hold, in its own layout: what to write, and what a folder means for a model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lrcompile.checkpointing.files import CONFIG, OURS, Checkpoint, Content, as_adapter_error
from lrcompile.checkpointing.origin import matched_to_origin
from lrcompile.checkpointing.plans import Plan, base_tensors, blanks, dtype_notes, rank_notes
from lrcompile.errors import AdapterError, SpecError
from lrcompile.interop.peft_config import form_of, spec_to_peft, type_of
from lrcompile.interop.peft_experts import WRITTEN_AS, Reading, current, reading_of
from lrcompile.interop.peft_fitting import by_parameter, fitted
from lrcompile.interop.peft_keys import base_key, base_name, pack, places, slots_by_host
from lrcompile.interop.peft_matching import Unit, as_parameter, targets_for
from lrcompile.interop.peft_types import LORA, PeftType
from lrcompile.recipes import recipe
from lrcompile.sites.site import Site
from lrcompile.specs import Spec
from lrcompile.state import State, adapter_set


def fits(model: nn.Module, state: State, name: str) -> bool:
    """Does a type of PEFT's compute what the adapter `name` computes, with just the tensors it has?"""
    spec, sites = state.specs[name], state.sites[name]
    held = [adapter_set(model, site)[name].state_dict(keep_vars=True) for site in sites]
    try:
        kinds = [type_of(spec, tensors) for tensors in held]
    except SpecError:
        return False
    if not kinds or not all(_has_words_for(site, tensors) for site, tensors in zip(sites, held, strict=True)):
        return False
    shared = [{id(tensors[local]) for tensors in held} for local in kinds[0].shared]
    own = [id(tensor) for tensors in held for local, tensor in tensors.items() if local not in kinds[0].shared]
    return all(len(each) == 1 for each in shared) and len(set(own)) == len(own)


def content(model: nn.Module, state: State, name: str) -> Content:
    spec, sites = state.specs[name], state.sites[name]
    method, kind = recipe(spec.method), type_of(spec)
    # codes that were chosen together with the factors are in no checkpoint of the base: PEFT must not find that one
    own_codes = method.quantizes_base and method.nf4 is not None
    where = None if own_codes else getattr(model, "name_or_path", None) or None
    config = spec_to_peft(spec, **targets_for(model, spec, sites, kind.settings), base_model_name_or_path=where)
    # a setting that is not there is one that older readers need not know
    config = {key: value for key, value in config.items() if value is not None}
    if "target_parameters" in config:
        config["peft_version"] = WRITTEN_AS
    adapted = by_parameter(config, sites)
    tensors: dict[str, Tensor] = {}
    for place in places(model, adapted, kind, form_of(spec), config):
        packed = pack(place, _detached(adapter_set(model, place.unit.site)[name]))
        tensors |= {key: packed[tensor] for tensor, key in place.keys.items()}
    wrapped = slots_by_host(adapted)
    for parameter in state.trained.names_of(name):
        tensors[base_key(wrapped, parameter)] = state.trained.value(model, name, parameter).detach()
    return Content(config, tensors)


def planned(model: nn.Module, state: State | None, checkpoint: Checkpoint) -> Plan:
    keys, entries = set(checkpoint.tensors.entries), checkpoint.tensors.entries
    notes = list(checkpoint.notes)
    reading: Reading = current
    if checkpoint.spec is not None and checkpoint.base is not None:
        spec = checkpoint.spec
        kind, tensors = _checked_type(spec, checkpoint)
        matched, compared = matched_to_origin(model, state, spec, checkpoint)
        notes += compared
        adapted = by_parameter(checkpoint.config, matched.hit)
        wrapped = slots_by_host(adapted)
        trained = {base_key(wrapped, each): each for each in matched.trained}
    else:
        try:
            spec, adapted, matched = fitted(model, checkpoint.config)
        except AdapterError as error:
            raise as_adapter_error(error, checkpoint.folder) from error
        kind, tensors = _checked_type(spec, checkpoint)
        reading = _reading(model, adapted, kind, checkpoint)
        wrapped = slots_by_host(adapted)
        # PEFT trains biases called just "bias"
        trained = {base_key(wrapped, each): each for each in matched.trained}
        trained = {key: each for key, each in trained.items() if key in keys or not _only_ours(each)}
        spec = _with_dtype(spec, [entries[key].dtype for key in keys - set(trained)])
        notes += _attention_note(adapted)
    for site, held in blanks(spec, matched.hit, checkpoint.folder).items():
        if beyond := sorted(set(held) - set(tensors)):
            raise AdapterError(
                f"the adapter in {checkpoint.folder} is {spec.method}, which keeps {', '.join(beyond)} at {site} too;"
                f" PEFT's layout has no place for that, so {OURS} is not the file that was written with it"
            )
    matched = replace(matched, trained=tuple(trained.values()))
    found = places(model, adapted, kind, tensors, checkpoint.config, reading)
    known = set(trained) | {key for place in found for key in place.keys.values()}
    base = base_tensors(model) if keys - known else {}
    frozen = {key: base_name(key) for key in keys - known if base_name(key) in base}
    notes += rank_notes(spec, matched.hit) + dtype_notes(model, trained, checkpoint)
    return Plan(spec, matched, found, trained, {}, frozen, tuple(notes))


def _checked_type(spec: Spec, checkpoint: Checkpoint) -> tuple[PeftType, frozenset[str]]:
    try:
        kind = type_of(spec)
    except SpecError as error:
        raise as_adapter_error(error, checkpoint.folder) from error
    if checkpoint.config.get("peft_type") != kind.name:
        raise AdapterError(
            f"the adapter in {checkpoint.folder} is {spec.method}, PEFT's {kind.name}, and {CONFIG} says"
            f" {checkpoint.config.get('peft_type')!r}"
        )
    return kind, form_of(spec)


def _reading(model: nn.Module, adapted: list[Unit], kind: PeftType, checkpoint: Checkpoint) -> Reading:
    found = {id(place.unit): place.keys for place in places(model, adapted, kind, ("A", "B"))} if kind is LORA else {}

    def shapes(unit: Unit) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        pair = [checkpoint.tensors.entries.get(key) for key in found[id(unit)].values()]
        return None if None in pair else tuple(tuple(each.shape) for each in pair)  # type: ignore[return-value, union-attr]

    try:
        return reading_of(model, adapted, shapes, checkpoint.config)
    except AdapterError as error:
        raise as_adapter_error(error, checkpoint.folder) from error


def _has_words_for(site: Site, tensors: dict[str, Any]) -> bool:
    """PEFT has all but the plain pair for modules only, and for those of a linear map the layout that we have."""
    return set(tensors) == {"A", "B"} or (site.kind in ("linear", "conv1d") and not as_parameter(site))


def _only_ours(parameter: str) -> bool:
    local = parameter.rpartition(".")[2]
    return local != "bias" and local.endswith("bias")


def _with_dtype(spec: Spec, dtypes: list[torch.dtype]) -> Spec:
    """The dtype of the factors where it is one, and not what a spec without `dtype` gives."""
    names = {str(dtype).removeprefix("torch.") for dtype in dtypes}
    return Spec.from_dict(spec.to_dict() | {"dtype": names.pop()}) if len(names) == 1 and names != {"float32"} else spec


def _attention_note(adapted: list[Unit]) -> list[str]:
    whole = [unit.site.host for unit in adapted if unit.site.kind == "attention" and not unit.by_parameter]
    if not whole:
        return []
    return [
        f"{', '.join(whole[:4])}: PEFT 0.21 applies the update of out_proj twice in nn.MultiheadAttention; here"
        " it is applied once, so outputs differ from PEFT's"
    ]


def _detached(adapter: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in adapter.state_dict(keep_vars=True).items()}
