"""Adapters that PEFT's LORA can hold, in its own layout: what to write, and what a folder means for a model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lrcompile.checkpointing.files import OURS, Checkpoint, Content, as_adapter_error
from lrcompile.checkpointing.origin import matched_to_origin
from lrcompile.checkpointing.plans import Plan, base_tensors, blanks, dtype_notes, rank_notes
from lrcompile.errors import AdapterError, SpecError
from lrcompile.interop.peft_config import spec_to_peft, why_not_lora
from lrcompile.interop.peft_fitting import by_parameter, fitted
from lrcompile.interop.peft_keys import base_key, base_name, pack, places
from lrcompile.interop.peft_matching import Unit, as_parameter, targets_for
from lrcompile.recipes import recipe
from lrcompile.sites.site import Site
from lrcompile.specs import Spec
from lrcompile.state import State, adapter_set


def fits(model: nn.Module, state: State, name: str) -> bool:
    """Does PEFT's LORA compute what the adapter `name` computes, with just the tensors it has?"""
    method, held = recipe(state.specs[name].method), []
    for site in state.sites[name]:
        tensors = adapter_set(model, site)[name].state_dict(keep_vars=True)
        if why_not_lora(method, tensors) is not None or not _has_words_for(site, tensors):
            return False
        held += [id(tensor) for tensor in tensors.values()]
    return method.form is not None and len(set(held)) == len(held)


def content(model: nn.Module, state: State, name: str) -> Content:
    spec, sites = state.specs[name], state.sites[name]
    method = recipe(spec.method)
    # codes that were chosen together with the factors are in no checkpoint of the base: PEFT must not find that one
    own_codes = method.quantizes_base and method.nf4 is not None
    where = None if own_codes else getattr(model, "name_or_path", None) or None
    config = spec_to_peft(spec, **targets_for(model, spec, sites), base_model_name_or_path=where)
    # a setting that is not there is one that older readers need not know
    config = {key: value for key, value in config.items() if value is not None}
    adapted = by_parameter(config, sites)
    tensors: dict[str, Tensor] = {}
    for place in places(model, adapted, tensors_of(spec)):
        held = adapter_set(model, place.unit.site)[name].state_dict()
        packed = pack(model, place.unit, held)
        tensors |= {key: packed[tensor] for tensor, key in place.keys.items()}
    for parameter in state.trained.names_of(name):
        tensors[base_key(adapted, parameter)] = state.trained.value(model, name, parameter).detach()
    return Content(config, tensors)


def planned(model: nn.Module, state: State | None, checkpoint: Checkpoint) -> Plan:
    keys, entries = set(checkpoint.tensors.entries), checkpoint.tensors.entries
    notes = list(checkpoint.notes)
    if checkpoint.spec is not None and checkpoint.base is not None:
        spec = checkpoint.spec
        tensors = _checked_tensors(spec, checkpoint)
        matched, compared = matched_to_origin(model, state, spec, checkpoint)
        notes += compared
        adapted = by_parameter(checkpoint.config, matched.hit)
        trained = {base_key(adapted, each): each for each in matched.trained}
    else:
        try:
            spec, adapted, matched = fitted(model, checkpoint.config)
        except AdapterError as error:
            raise as_adapter_error(error, checkpoint.folder) from error
        tensors = _checked_tensors(spec, checkpoint)
        # PEFT trains biases called just "bias"
        trained = {base_key(adapted, each): each for each in matched.trained}
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
    found = places(model, adapted, tensors)
    known = set(trained) | {key for place in found for key in place.keys.values()}
    base = base_tensors(model)
    frozen = {key: base_name(key) for key in keys - known if base_name(key) in base}
    notes += rank_notes(spec, matched.hit) + dtype_notes(model, trained, checkpoint)
    return Plan(spec, matched, found, trained, {}, frozen, tuple(notes))


def tensors_of(spec: Spec) -> tuple[str, ...]:
    return ("A", "B", "m") if spec_to_peft(spec).get("use_dora") else ("A", "B")


def _checked_tensors(spec: Spec, checkpoint: Checkpoint) -> tuple[str, ...]:
    try:
        return tensors_of(spec)
    except SpecError as error:
        raise as_adapter_error(error, checkpoint.folder) from error


def _has_words_for(site: Site, tensors: dict[str, Any]) -> bool:
    """PEFT has magnitudes for modules only, and for those of a linear map the layout that we have."""
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
