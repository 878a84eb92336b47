"""What an adapter folder means for a model, checked as a whole before anything is changed."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lrcompile.checkpointing import files as adapter_files
from lrcompile.checkpointing.files import Checkpoint
from lrcompile.errors import AdapterError
from lrcompile.interop.peft_config import MAX_RANK
from lrcompile.interop.peft_keys import Place, pack, unpack
from lrcompile.matching import Matched
from lrcompile.recipes import recipe
from lrcompile.recipes.forms.adapter import Adapter
from lrcompile.recipes.recipe import part
from lrcompile.sites import ADAPTERS
from lrcompile.sites.site import Site
from lrcompile.specs import Spec
from lrcompile.state import State
from lrcompile.walking import submodule
from lrcompile.wording import listed
from lrcompile.written import expect_writes

_META = torch.device("meta")


@dataclass(frozen=True)
class Plan:
    """What a checkpoint means for a model, before anything is changed."""

    spec: Spec
    matched: Matched
    places: list[Place]
    """Where the tensors of each site are; a tensor that several sites share has one key."""
    trained: dict[str, str]
    """By key: the base parameter trained in full."""
    written: dict[str, Site]
    """By key: the site whose weight the method has written."""
    frozen: dict[str, str]
    """By key: what PEFT writes along of the base without training it; it must be what the base has."""
    notes: tuple[str, ...]


def blanks(spec: Spec, hit: tuple[Site, ...], folder: Path) -> dict[str, dict[str, Tensor]]:
    """By site name: the tensors an adapter of `spec` has there, without memory; the same ones at sites of one shape."""
    method = recipe(spec.method)
    if method.form is None:
        return {}
    for site in hit:
        spec.scale_of(site.name)  # raises where float32 cannot hold it
        if (rank := spec.rank_of(site.name)) > MAX_RANK:
            raise AdapterError(f"the adapter in {folder} has rank {rank} at {site.name}; no adapter has")
    form: type[Adapter] = part(method.form)
    shared = form.share(spec, hit, dtype=torch.float32, device=_META)
    known: dict[Hashable, dict[str, Tensor]] = {}
    out = {}
    for site in hit:
        alike = replace(site, name="", host="", slot="", aliases=(), refusal=None, graph=None)
        key = (form.at(spec, site), alike, spec.rank_of(site.name))
        if key not in known:
            adapter = form.build(spec, site, shared, dtype=torch.float32, device=_META)
            if method.writes_base:
                expect_writes(adapter, _META)
            known[key] = adapter.state_dict(keep_vars=True)
        out[site.name] = known[key]
    return out


def rank_notes(spec: Spec, hit: tuple[Site, ...]) -> list[str]:
    return [
        f"{site.name}: rank {spec.rank_of(site.name)} is above {min(site.in_features, site.out_features)},"
        " the most its weight can have"
        for site in hit
        if not recipe(spec.method).any_rank and spec.rank_of(site.name) > min(site.in_features, site.out_features)
    ]


def dtype_notes(model: nn.Module, trained: Mapping[str, str], checkpoint: Checkpoint) -> list[str]:
    entries, notes = checkpoint.tensors.entries, []
    for key, name in trained.items():
        held = model.get_parameter(name).dtype
        if key in entries and entries[key].dtype != held:
            notes.append(f"{name}: the adapter's value is {entries[key].dtype}, held as {held} like the base's")
    return notes


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of the base by every name they have."""
    both = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor for name, tensor in both if ADAPTERS not in name.split(".")}


def check(model: nn.Module, plan: Plan, checkpoint: Checkpoint) -> None:
    """Raise one error that lists everything by which the announced tensors are not the expected ones."""
    expected = _expected(model, plan, checkpoint)
    entries = checkpoint.tensors.entries
    faults = []
    if unknown := sorted(set(entries) - set(expected) - set(plan.frozen)):
        faults.append(f"unknown keys ({len(unknown)}): {listed(unknown)}")
    if missing := sorted(set(expected) - set(entries)):
        faults.append(f"missing keys ({len(missing)}): {listed(missing)}")
    there = [(key, entries[key], expected[key]) for key in expected if key in entries]
    if wrong := [
        f"{key} is {list(entry.shape)}, expected {list(wanted.shape)}"
        for key, entry, wanted in there
        if entry.shape != wanted.shape
    ]:
        faults.append(f"wrong shapes ({len(wrong)}): {listed(wrong)}")
    if odd := [
        f"{key} is {entry.dtype}, expected {wanted.dtype}"
        for key, entry, wanted in there
        if entry.dtype != wanted.dtype and not (entry.dtype.is_floating_point and wanted.is_floating_point())
    ]:
        faults.append(f"wrong dtypes ({len(odd)}): {listed(odd)}")
    if faults:
        raise AdapterError(
            f"{checkpoint.tensors.path} does not fit this {type(model).__name__} as {adapter_files.CONFIG} says:\n  "
            + "\n  ".join(faults)
            + "\nLoad the base it was trained on, or correct the config."
        )


def _expected(model: nn.Module, plan: Plan, checkpoint: Checkpoint) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {key: model.get_parameter(name) for key, name in plan.trained.items()}
    out |= {key: model.get_parameter(site.parameter) for key, site in plan.written.items()}
    held = blanks(plan.spec, plan.matched.hit, checkpoint.folder)
    for place in plan.places:
        packed = pack(place, held[place.unit.site.name])
        for tensor, key in place.keys.items():
            if out.setdefault(key, packed[tensor]).shape != packed[tensor].shape:
                raise AdapterError(
                    f"the adapter in {checkpoint.folder} holds one tensor, {key}, for tensors of {list(out[key].shape)}"
                    f" and {list(packed[tensor].shape)}"
                )
    return out


def values_at(model: nn.Module, spec: Spec, place: Place, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a site's adapter, on the device of the base."""
    site = place.unit.site
    host = submodule(model, site.host)
    device = next(
        (t.device for t in [*host.parameters(recurse=False), *host.buffers(recurse=False)]), torch.device("cpu")
    )
    if device.type == "meta":
        raise AdapterError(f"{site.name} is on the meta device; load the base's weights first, then the adapter")
    stored = {tensor: tensors[key] for tensor, key in place.keys.items()}
    unpacked = unpack(place, stored, spec.rank_of(site.name))
    # copies: the file's buffer must not stay alive, and unaligned memory would round otherwise
    return {
        tensor: value.to(device, copy=True, memory_format=torch.contiguous_format) for tensor, value in unpacked.items()
    }


def refuse_other_base_values(
    model: nn.Module, state: State | None, plan: Plan, tensors: Mapping[str, Tensor], folder: Path
) -> None:
    """PEFT also writes embeddings (targeted or resized) and buffers: harmless only where they are what the base has."""
    base = base_tensors(model) if plan.frozen else {}
    held = state.trained.base if state is not None else {}
    # beside a module trained in full lies its untouched original, and a second copy of what was trained
    copies = {name: key for key, name in plan.trained.items()}
    for key, name in plan.frozen.items():
        there = tensors[copies[name]] if ".modules_to_save." in key and name in copies else held.get(name, base[name])
        if there.shape != tensors[key].shape or not torch.equal(there.detach().cpu(), tensors[key].to(there.dtype)):
            raise AdapterError(
                f"the adapter in {folder} also carries {key}, which is {list(tensors[key].shape)} and not what this"
                f" base has ({list(there.shape)}): the base was resized or changed in training. Load that base, or add"
                " the module to modules_to_save"
            )
