"""What an adapter folder means for a model, found out and checked as a whole before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lrcompile.checkpointing import files as adapter_files
from lrcompile.checkpointing.base_print import differences
from lrcompile.checkpointing.files import Checkpoint, as_adapter_error
from lrcompile.errors import AdapterError
from lrcompile.interop.peft_fitting import by_parameter, fitted
from lrcompile.interop.peft_keys import Pair, base_key, base_name, pack, pairs, unpack
from lrcompile.interop.peft_matching import Unit
from lrcompile.matching import Matched, match
from lrcompile.sites import ADAPTERS
from lrcompile.sites.site import Site
from lrcompile.specs import Spec
from lrcompile.state import State
from lrcompile.wording import listed

_MAX_RANK = 1 << 24


@dataclass(frozen=True)
class Plan:
    """What a checkpoint means for a model, before anything is changed."""

    spec: Spec
    matched: Matched
    units: list[Unit]
    pairs: list[Pair]
    trained: dict[str, str]
    """By key: the base parameter trained in full."""
    frozen: dict[str, str]
    """By key: what PEFT writes along of the base without training it; it must be what the base has."""
    notes: tuple[str, ...]


def planned(model: nn.Module, state: State | None, checkpoint: Checkpoint) -> Plan:
    folder, keys = checkpoint.folder, set(checkpoint.tensors.entries)
    notes = list(checkpoint.notes)
    if checkpoint.spec is not None and checkpoint.base is not None:
        spec = checkpoint.spec
        matched = match(model, spec, allow_high_rank=True)
        faults, compared = differences(checkpoint.base, model, state, matched.hit)
        if faults:
            raise AdapterError(
                f"the adapter in {folder} is for another base than this {type(model).__name__}: {'; '.join(faults)}."
                f" Load that base (or remove {adapter_files.OURS} from the folder to go by shapes alone)"
            )
        notes += compared
        adapted = by_parameter(checkpoint.config, matched.hit)
        trained = {base_key(adapted, each): each for each in matched.trained}
    else:
        try:
            spec, adapted, matched = fitted(model, checkpoint.config)
        except AdapterError as error:
            raise as_adapter_error(error, folder) from error
        # PEFT trains biases called just "bias"
        trained = {base_key(adapted, each): each for each in matched.trained}
        trained = {key: each for key, each in trained.items() if key in keys or not _only_ours(each)}
        spec = _with_dtype(spec, [checkpoint.tensors.entries[key].dtype for key in keys - set(trained)])
        notes += _attention_note(adapted)
    matched = replace(matched, trained=tuple(trained.values()))
    found = pairs(model, adapted)
    known = set(trained) | {key for pair in found for key in (pair.A, pair.B)}
    base = _base_tensors(model)
    frozen = {key: base_name(key) for key in keys - known if base_name(key) in base}
    notes += [
        f"{site.name}: rank {spec.rank_of(site.name)} is above {min(site.in_features, site.out_features)},"
        " the most its weight can have"
        for site in matched.hit
        if spec.rank_of(site.name) > min(site.in_features, site.out_features)
    ]
    for key, each in trained.items():
        if key in keys and (stored := checkpoint.tensors.entries[key].dtype) != (
            held := model.get_parameter(each).dtype
        ):
            notes.append(f"{each}: the adapter's value is {stored}, held as {held} like the base's")
    return Plan(spec, matched, adapted, found, trained, frozen, tuple(notes))


def _base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of the base by every name they have."""
    both = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor for name, tensor in both if ADAPTERS not in name.split(".")}


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


def check(model: nn.Module, plan: Plan, checkpoint: Checkpoint) -> None:
    """Raise one error that lists everything by which the announced tensors are not the expected ones."""
    for site in plan.matched.hit:
        plan.spec.scale_of(site.name)  # raises where float32 cannot hold it
        if (rank := plan.spec.rank_of(site.name)) > _MAX_RANK:
            raise AdapterError(f"the adapter in {checkpoint.folder} has rank {rank} at {site.name}; no adapter has")
    expected = _expected_shapes(model, plan)
    entries = checkpoint.tensors.entries
    faults = []
    if unknown := sorted(set(entries) - set(expected) - set(plan.frozen)):
        faults.append(f"unknown keys ({len(unknown)}): {listed(unknown)}")
    if missing := sorted(set(expected) - set(entries)):
        faults.append(f"missing keys ({len(missing)}): {listed(missing)}")
    wrong = [key for key in expected if key in entries and entries[key].shape != expected[key]]
    if wrong:
        shapes = [f"{key} is {list(entries[key].shape)}, expected {list(expected[key])}" for key in wrong]
        faults.append(f"wrong shapes ({len(wrong)}): {listed(shapes)}")
    if faults:
        raise AdapterError(
            f"{checkpoint.tensors.path} does not fit this {type(model).__name__} as {adapter_files.CONFIG} says:\n  "
            + "\n  ".join(faults)
            + "\nLoad the base it was trained on, or correct the config."
        )


def _expected_shapes(model: nn.Module, plan: Plan) -> dict[str, tuple[int, ...]]:
    shapes = {key: tuple(model.get_parameter(each).shape) for key, each in plan.trained.items()}
    for pair in plan.pairs:
        A, B = _meta_factors(pair.unit.site, plan.spec.rank_of(pair.unit.site.name))
        packed = pack(model, pair.unit, A, B)
        shapes |= {pair.A: tuple(packed[0].shape), pair.B: tuple(packed[1].shape)}
    return shapes


def _meta_factors(site: Site, rank: int) -> tuple[Tensor, Tensor]:
    lead = () if site.copies is None else (site.copies,)
    empty = lambda *shape: torch.empty(*lead, *shape, device="meta")  # noqa: E731
    return empty(rank, site.in_features), empty(site.out_features, rank)


def factors_of(model: nn.Module, pair: Pair, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The site's A and B, on the device of the base."""
    host = model.get_submodule(pair.unit.site.host)
    device = next(
        (t.device for t in [*host.parameters(recurse=False), *host.buffers(recurse=False)]), torch.device("cpu")
    )
    if device.type == "meta":
        raise AdapterError(
            f"{pair.unit.site.name} is on the meta device; load the base's weights first, then the adapter"
        )
    A, B = unpack(model, pair.unit, tensors[pair.A], tensors[pair.B])
    # copies: the file's buffer must not stay alive, and unaligned memory would round otherwise
    own = lambda tensor: tensor.to(device, copy=True, memory_format=torch.contiguous_format)  # noqa: E731
    return own(A), own(B)


def refuse_other_base_values(
    model: nn.Module, state: State | None, plan: Plan, tensors: Mapping[str, Tensor], folder: Path
) -> None:
    """PEFT also writes embeddings (targeted or resized) and buffers: harmless only where they are what the base has."""
    base = _base_tensors(model)
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
