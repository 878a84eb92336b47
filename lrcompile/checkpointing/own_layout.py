"""Adapters that PEFT has no words for: the same files, every tensor by site and name, shared ones written once.

    adapter.<site>.<tensor>     base.<parameter trained in full>     written.<weight that the method has written>

`peft_type` is one PEFT does not have, so that it refuses the folder instead of misreading it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lrcompile.checkpointing.files import OURS, OWN, WEIGHTS, Checkpoint, Content
from lrcompile.checkpointing.origin import matched_to_origin
from lrcompile.checkpointing.plans import Plan, blanks, dtype_notes, rank_notes
from lrcompile.errors import AdapterError
from lrcompile.interop.peft_keys import Place
from lrcompile.interop.peft_matching import Unit
from lrcompile.recipes import recipe
from lrcompile.recipes.recipe import part
from lrcompile.sites.site import Site
from lrcompile.specs import Spec
from lrcompile.state import State, adapter_set
from lrcompile.wording import listed
from lrcompile.written import FLAG, written_by


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
    written_now = () if _among_tensors(spec) else written_by(model, name)
    for site in state.sites[name]:
        if site.parameter in written_now:
            tensors[_written_key(site)] = _written_value(model, state, name, site).detach()
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
    written = {}
    if recipe(spec.method).writes_base:
        written = {key: site for site in matched.hit if (key := _written_key(site)) in checkpoint.tensors.entries}
    valued = trained | {key: site.parameter for key, site in written.items()}
    notes = [*checkpoint.notes, *notes, *rank_notes(spec, matched.hit), *dtype_notes(model, valued, checkpoint)]
    return Plan(spec, matched, places, trained, written, {}, tuple(notes))


def check_written(plan: Plan, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """A weight is there where its flag says that it was written, and only there."""
    places = () if _among_tensors(plan.spec) else plan.places
    told = {_written_key(p.unit.site) for p in places if FLAG in p.keys and bool(tensors[p.keys[FLAG]])}
    if odd := sorted(told ^ set(plan.written)):
        raise AdapterError(
            f"{folder / WEIGHTS} does not hold the weights that its flags say were written: {listed(odd)}"
        )


def _among_tensors(spec: Spec) -> bool:
    """Does the adapter itself hold the weights it writes?"""
    form = recipe(spec.method).form
    return form is not None and part(form).holds_weight


def _written_value(model: nn.Module, state: State, name: str, site: Site) -> Tensor:
    """The weight with what this adapter's training wrote, whoever's value is in its place now; below a merge."""
    own, shown = state.trained.values.get(name, {}), state.trained.in_place.get(site.parameter)
    if site.parameter in own and shown != name:
        return own[site.parameter]
    if site.parameter not in own and shown is not None:
        return state.trained.base[site.parameter]
    fold = state.folds.get(site.name)
    if fold is not None and fold.base.data is not None:
        return fold.base.data
    return model.get_parameter(site.parameter).data


def _key(site: Site, local: str) -> str:
    return f"adapter.{site.name}.{local}"


def _base_key(parameter: str) -> str:
    return f"base.{parameter}"


def _written_key(site: Site) -> str:
    return f"written.{site.parameter}"


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
