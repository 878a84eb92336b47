"""Adapters that PEFT has no words for: the same files, every tensor by site and name, shared ones written once.

    adapter.<site>.<tensor>      base.<parameter>

`peft_type` is one PEFT does not have, so that it refuses the folder instead of misreading it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lrcompile.checkpointing.files import OURS, OWN, Checkpoint, Content
from lrcompile.checkpointing.origin import matched_to_origin
from lrcompile.checkpointing.plans import Plan, blanks, dtype_notes, rank_notes
from lrcompile.errors import AdapterError
from lrcompile.interop.peft_keys import Place
from lrcompile.interop.peft_matching import Unit
from lrcompile.recipes import recipe
from lrcompile.sites.site import Site
from lrcompile.state import State, adapter_set
from lrcompile.wording import listed


def content(model: nn.Module, state: State, name: str) -> Content:
    spec = state.specs[name]
    config: dict[str, Any] = {"peft_type": OWN, **spec.to_dict()}
    if where := getattr(model, "name_or_path", None):
        config["base_model_name_or_path"] = where
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    written: dict[int, str] = {}
    for site in state.sites[name]:
        for local, tensor in adapter_set(model, site)[name].state_dict(keep_vars=True).items():
            key = _key(site, local)
            first = written.setdefault(id(tensor), key)
            if first == key:
                tensors[key] = tensor.detach()
            else:
                aliases[key] = first
    for parameter in state.trained.names_of(name):
        tensors[_base_key(parameter)] = state.trained.value(model, name, parameter).detach()
    return Content(config, tensors, aliases)


def planned(model: nn.Module, state: State | None, checkpoint: Checkpoint) -> Plan:
    spec = checkpoint.spec
    if spec is None:
        raise AdapterError(
            f"the adapter in {checkpoint.folder} is in lrcompile's own layout, which {OURS} beside it describes;"
            " it is missing, or another config was written since. Save the adapter again"
        )
    matched, notes = matched_to_origin(model, state, spec, checkpoint)
    held = blanks(spec, matched.hit, checkpoint.folder)
    _check_aliases(checkpoint, {_key(site, local): local for site in matched.hit for local in held[site.name]})
    places = [
        Place(
            Unit(site, by_parameter=False, key=site.name),
            {local: checkpoint.aliases.get(key := _key(site, local), key) for local in held[site.name]},
        )
        for site in matched.hit
    ]
    trained = {_base_key(parameter): parameter for parameter in matched.trained}
    notes = [*checkpoint.notes, *notes, *rank_notes(spec, matched.hit), *dtype_notes(model, trained, checkpoint)]
    return Plan(spec, matched, places, trained, {}, tuple(notes))


def _key(site: Site, local: str) -> str:
    return f"adapter.{site.name}.{local}"


def _base_key(parameter: str) -> str:
    return f"base.{parameter}"


def _check_aliases(checkpoint: Checkpoint, known: dict[str, str]) -> None:
    """An alias stands for a tensor that is there, and that trains where it does."""
    assert checkpoint.spec is not None
    trains = recipe(checkpoint.spec.method).trains
    aliases = checkpoint.aliases
    wrong = [
        f"{key} → {first}"
        for key, first in aliases.items()
        if key not in known
        or first not in known
        or first in aliases
        or (known[key] in trains) != (known[first] in trains)
    ]
    if wrong:
        raise AdapterError(f"{checkpoint.folder / OURS} shares tensors that cannot be shared: {listed(wrong)}")
