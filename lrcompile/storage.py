"""How the coded maps of a model are stored, as plain data, and a plain model made to hold them: what its folder and a
golden of it say.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrcompile.allocating import BITS
from lrcompile.budgets import NF4
from lrcompile.coded import CodedLinear, Layout, attach_coded, coded_layout, is_coded
from lrcompile.errors import ModelError
from lrcompile.integers.blocks import BLOCK_SIZES as INTEGER_BLOCKS
from lrcompile.integers.modules import IntegerLayout, IntegerLinear
from lrcompile.kernels.nf4_dequant import BLOCK_SIZES as NF4_BLOCKS
from lrcompile.kernels.nf4_dequant import nf4_shapes
from lrcompile.nf4.modules import Layout as Nf4Layout
from lrcompile.nf4.modules import Nf4Linear, codes_of, is_nf4
from lrcompile.nf4.targets import chosen
from lrcompile.safe_tensors import Entry
from lrcompile.wording import listed

_DTYPES = {str(each).removeprefix("torch."): each for each in
           (torch.float16, torch.bfloat16, torch.float32, torch.float64)}  # fmt: skip
_FORMS = (NF4, *BITS)
_MOST = 8  # faults that are listed
PARTS = frozenset((*Nf4Linear.PARTS, *IntegerLinear.PARTS))


@dataclass(frozen=True)
class Map:
    """A linear map that is to hold codes: what its class and layout become, and which tensors it takes by buffer."""

    module: nn.Module
    storage: type[CodedLinear]
    layout: Layout
    parts: Mapping[str, Entry | None]


def is_quantized(model: nn.Module) -> bool:
    return any(is_coded(module) for module in model.modules())


def described_maps(model: nn.Module) -> dict[str, dict[str, Any]]:
    """By name, how each coded map of `model` is stored; empty for a plain model. Sizes are those of the plain model."""
    return {name: _described(module) for name, module in model.named_modules() if is_coded(module)}


def _described(module: nn.Module) -> dict[str, Any]:
    layout = coded_layout(module)
    said = {"block_size": layout.block_size, "dtype": _named(layout.dtype)}
    if not is_nf4(module):
        return {"form": f"int{layout.bits}", **said}
    compute = None if layout.compute_dtype is None else _named(layout.compute_dtype)
    return {"form": NF4, **said, "double_quant": codes_of(module).absmax_scale is not None, "compute_dtype": compute}


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def checked_maps(model: nn.Module, described: Any) -> dict[str, Map]:
    """What `described_maps` said, as something that `model`, still plain there, can be given. Nothing is allocated.

    Raises `ModelError` for a description that is malformed, `TargetError` for maps that the model does not have, or
    that cannot hold codes.
    """
    if not isinstance(described, dict) or not described:
        raise ModelError("the description of stored maps must name at least one")
    for name, said in described.items():
        _check(name, said)
    modules, _ = chosen(model, "|".join(map(re.escape, described)), ())
    if odd := sorted(set(described) ^ set(modules)):
        raise ModelError(f"{', '.join(map(repr, odd[:8]))} stand for one module under two names, or for none")
    return {name: _map(modules[name], said) for name, said in described.items()}


def _check(name: str, said: Any) -> None:
    keys = {"form", "block_size", "dtype"}
    form = said.get("form") if isinstance(said, dict) else None
    if form not in _FORMS:
        raise ModelError(f"{name!r} is stored as {form!r}; expected one of {', '.join(_FORMS)}")
    keys |= {"double_quant", "compute_dtype"} if form == NF4 else set()
    if set(said) != keys:
        raise ModelError(f"{name!r} must say exactly {', '.join(sorted(keys))}, not {', '.join(sorted(said))}")
    blocks = NF4_BLOCKS if form == NF4 else INTEGER_BLOCKS
    if type(said["block_size"]) is not int or said["block_size"] not in blocks:
        raise ModelError(f"{name!r} has block_size {said['block_size']!r}; expected one of {blocks}")
    if type(said.get("double_quant", False)) is not bool:
        raise ModelError(f"{name!r} has double_quant {said['double_quant']!r}; expected true or false")
    for key in ("dtype", "compute_dtype"):
        given = said.get(key)
        if not (isinstance(given, str) and given in _DTYPES) and not (key == "compute_dtype" and given is None):
            raise ModelError(f"{name!r} has {key} {given!r}; expected one of {', '.join(_DTYPES)}")


def _map(module: nn.Module, said: Mapping[str, Any]) -> Map:
    weight: Tensor = module._parameters["weight"]  # type: ignore[assignment]
    transposed = not isinstance(module, nn.Linear)
    out, inside = weight.shape[::-1] if transposed else weight.shape
    common = (out, inside, transposed, said["block_size"], _DTYPES[said["dtype"]])
    block = said["block_size"]
    if said["form"] == NF4:
        compute = said["compute_dtype"] and _DTYPES[said["compute_dtype"]]
        codes, maxima, scales = nf4_shapes(out * inside, block)
        double = said["double_quant"]
        entries = (
            Entry(torch.uint8, (codes,)),
            Entry(torch.uint8 if double else torch.float32, (maxima,)),
            Entry(torch.float32, (scales,)) if double else None,
            Entry(torch.float32, ()) if double else None,
        )
        return Map(module, Nf4Linear, Nf4Layout(*common, compute), dict(zip(Nf4Linear.PARTS, entries, strict=True)))
    bits, count = BITS[said["form"]], math.ceil(inside / block)
    parts = (Entry(torch.uint8, (out, count, block * bits // 8)), Entry(torch.float32, (out, count)))
    layout = IntegerLayout(*common, bits)
    return Map(module, IntegerLinear, layout, dict(zip(IntegerLinear.PARTS, parts, strict=True)))


def coded_entries(model: nn.Module, maps: Mapping[str, Map]) -> dict[str, Entry]:
    """By name in the state dict, the tensors that `maps` take."""
    coded = {id(each.module): each.parts for each in maps.values()}
    return {
        f"{_prefix(name)}{part}": entry
        for name, module in model.named_modules(remove_duplicate=False)
        for part, entry in coded.get(id(module), {}).items()
        if entry is not None
    }


def state_entries(model: nn.Module, maps: Mapping[str, Map]) -> dict[str, Entry]:
    """By name, what `model.state_dict()` would hold once the maps have their codes."""
    gone = {id(each.module._parameters["weight"]) for each in maps.values()}
    plain = {name: value for name, value in model.state_dict(keep_vars=True).items() if id(value) not in gone}
    return {name: Entry(value.dtype, tuple(value.shape)) for name, value in plain.items()} | coded_entries(model, maps)


def misfits(found: Mapping[str, Entry], expected: Mapping[str, Entry]) -> list[str]:
    """What is missing, unknown, of another shape or kind; floating tensors may be of any floating dtype but in codes,
    whose scales are float32.
    """
    faults = []
    if missing := [name for name in expected if name not in found]:
        faults.append(f"it lacks {listed(missing)}")
    if unknown := [name for name in found if name not in expected]:
        faults.append(f"it holds {listed(unknown)}, which the model has no place for")
    for name in [name for name in expected if name in found and not _fits(name, found[name], expected[name])]:
        faults.append(f"{name} is {_said(found[name])}, expected {_said(expected[name])}")
        if len(faults) > _MOST:
            return [*faults, "…"]
    return faults


def _said(entry: Entry) -> str:
    return f"{_named(entry.dtype)} {list(entry.shape)}"


def _fits(name: str, found: Entry, expected: Entry) -> bool:
    either = found.dtype.is_floating_point and expected.dtype.is_floating_point
    free = either and name.rpartition(".")[2] not in PARTS
    return found.shape == expected.shape and (free or found.dtype == expected.dtype)


def attach_maps(maps: Mapping[str, Map], tensors: Mapping[str, Tensor]) -> None:
    """Put codes in the place of the weights; `tensors` is a state dict that holds what `coded_entries` says."""
    moved = {}
    for name, each in maps.items():
        device = each.module._parameters["weight"].device  # type: ignore[union-attr]
        moved[name] = [
            None if entry is None else tensors[_prefix(name) + part].to(device) for part, entry in each.parts.items()
        ]
    for name, each in maps.items():
        attach_coded(each.module, each.storage, moved[name], each.layout)


def _prefix(name: str) -> str:
    return f"{name}." if name else ""
