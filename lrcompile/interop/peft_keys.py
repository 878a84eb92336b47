"""Names and layouts of tensors in PEFT's `adapter_model.safetensors`, both ways.

PEFT wraps what it adapts: a module `m` becomes `m` with the original at `m.base_layer`, so every name below it grows
by one `base_layer` for each wrapper. Two raw parameters of one module are two wrappers, the first registered
innermost. A stack of E experts is flat:

    lora_A [E·r, in], expert slowest          lora_B [out, r·E], expert fastest

DoRA's magnitudes lie beside the pair, under a name without ".weight"; of AdaLoRA's triplets, those that are left.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lrcompile.errors import SpecError
from lrcompile.interop.peft_experts import Reading, current, swapped
from lrcompile.interop.peft_matching import Unit, feeds_forward
from lrcompile.interop.peft_types import LORA, PeftType
from lrcompile.names import beginnings
from lrcompile.walking import submodule

PREFIX = "base_model.model"


_LOOKUP = {"A": "lora_embedding_A", "B": "lora_embedding_B"}


@dataclass(frozen=True)
class Place:
    """The tensors of one site in a file of PEFT's."""

    unit: Unit
    keys: Mapping[str, str]
    """By tensor of the form; one that all sites share has one key."""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Of tensors with one dimension here and more there."""
    kept: tuple[int, ...] | None = None
    """The rows of A and E, columns of B, that are there; None: all. What is not counts for nothing, its E being 0."""
    swapped: bool = False
    """Are A and B there those of the transposed map?"""


def places(
    model: nn.Module,
    adapted: Iterable[Unit],
    kind: PeftType = LORA,
    tensors: Iterable[str] = ("A", "B"),
    config: Mapping[str, Any] | None = None,
    reading: Reading = current,
) -> list[Place]:
    """The names under which PEFT stores these tensors of `adapted`, as `config` says where it does, and stacks of
    experts as it reads them.
    """
    adapted, tensors, config = list(adapted), tuple(tensors), config or {}
    wrapped, out = slots_by_host(adapted), []
    for unit in adapted:
        path = _path(unit.site.host, wrapped)
        prefix = ".".join(path[: len(path) - _depth(model, wrapped, unit)])
        local = _LOOKUP if unit.site.form == "lookup" and not unit.by_parameter else kind.keys
        keys = {tensor: kind.shared.get(tensor) or f"{prefix}.{local[tensor]}" for tensor in tensors}
        shapes = {"gain": (1, -1) if feeds_forward(config, unit) else (-1, 1)} if "gain" in tensors else {}
        kept = _kept(config, unit) if "E" in tensors else None
        out.append(Place(unit, keys, shapes, kept, unit.by_parameter and swapped(model, unit, reading)))
    return out


def _kept(config: Mapping[str, Any], unit: Unit) -> tuple[int, ...] | None:
    """AdaLoRA's `rank_pattern` in PEFT: by the name of E, which ranks are left."""
    given = config.get("rank_pattern") or {}
    mask = given.get(f"{unit.key}.lora_E")
    if mask is None:
        return None
    if not isinstance(mask, list) or not all(isinstance(each, bool) for each in mask):
        raise SpecError(f"rank_pattern of {unit.key} must be a list of true and false", field="rank_pattern")
    if len(mask) != config.get("init_r", 12):
        raise SpecError(f"rank_pattern of {unit.key} has {len(mask)} ranks, not init_r", field="rank_pattern")
    return tuple(index for index, each in enumerate(mask) if each)


def base_key(wrapped: Mapping[str, list[str]], name: str) -> str:
    """The name under which PEFT stores a parameter of the base that is trained in full, beside these adapted slots."""
    owner, _, local = name.rpartition(".")
    return ".".join([*_path(owner, wrapped), local])


def base_name(key: str) -> str:
    """Inverse of `base_key`, also for the copies PEFT writes of what it keeps beside a module trained in full."""
    inner = ("base_layer", "modules_to_save", "original_module")
    return ".".join(part for part in key.removeprefix(f"{PREFIX}.").split(".") if part not in inner)


def pack(place: Place, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A `[…, r, in]`, B `[…, out, r]` and what else the form has, as PEFT stores them."""
    unit, out = place.unit, dict(tensors)
    if unit.by_parameter:
        A, B = (out["B"].mT, out["A"].mT) if place.swapped else (out["A"], out["B"])
        if unit.site.copies is not None:
            A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
        out |= {"A": A, "B": B}
    if place.kept is not None:
        out |= {name: out[name].index_select(dim, _index(place.kept, out[name])) for name, dim in _RANKS.items()}
    return out | {name: out[name].reshape(shape) for name, shape in place.shapes.items()}


def unpack(place: Place, tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Inverse of `pack`, at a site of this rank."""
    unit, out = place.unit, dict(tensors)
    if unit.by_parameter:
        A, B = out["A"], out["B"]
        if unit.site.copies is not None:
            A, B = A.unflatten(0, (unit.site.copies, -1)), B.unflatten(1, (-1, unit.site.copies)).permute(2, 0, 1)
        out |= {"A": B.mT, "B": A.mT} if place.swapped else {"A": A, "B": B}
    if place.kept is not None:
        for name, dim in _RANKS.items():
            whole = out[name].new_zeros([rank if d == dim else size for d, size in enumerate(out[name].shape)])
            out[name] = whole.index_copy(dim, _index(place.kept, whole), out[name])
    return out | {name: out[name].flatten() for name in place.shapes}


_RANKS = {"A": 0, "E": 0, "B": 1}
"""The dimension that counts ranks."""


def _index(kept: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.tensor(kept, dtype=torch.int64, device=like.device)


def slots_by_host(adapted: Iterable[Unit]) -> dict[str, list[str]]:
    """The adapted slots of each host: it has one wrapper for each."""
    found: dict[str, list[str]] = {}
    for unit in adapted:
        found.setdefault(unit.site.host, []).append(unit.site.slot)
    return found


def _depth(model: nn.Module, wrapped: Mapping[str, list[str]], unit: Unit) -> int:
    """How many `base_layer` at the end of the host's path lie below this unit's own wrapper."""
    order = list(submodule(model, unit.site.host)._parameters)
    same = sorted(wrapped[unit.site.host], key=lambda slot: order.index(slot) if slot in order else -1)
    return same.index(unit.site.slot) + 1


def _path(module: str, wrapped: Mapping[str, list[str]]) -> list[str]:
    parts = [PREFIX, *["base_layer" for _ in wrapped.get("", ())]]
    for name in beginnings(module) if module else ():
        parts += [name.rpartition(".")[2], *["base_layer" for _ in wrapped.get(name, ())]]
    return parts
