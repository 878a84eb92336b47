"""Names and layouts of tensors in PEFT's `adapter_model.safetensors`, both ways.

PEFT wraps what it adapts: a module `m` becomes `m` with the original at `m.base_layer`, so every name below it grows
by one `base_layer` for each wrapper. Two raw parameters of one module are two wrappers, the first registered
innermost. A stack of E experts is flat:

    lora_A [E·r, in], expert slowest          lora_B [out, r·E], expert fastest

DoRA's magnitudes lie beside the pair, under a name without ".weight".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lrcompile.interop.peft_matching import Unit

PREFIX = "base_model.model"


_LORA = {"A": "lora_A.weight", "B": "lora_B.weight", "m": "lora_magnitude_vector"}
_LOOKUP = {"A": "lora_embedding_A", "B": "lora_embedding_B"}


@dataclass(frozen=True)
class Place:
    """The tensors of one site in a file of PEFT's."""

    unit: Unit
    keys: Mapping[str, str]
    """By tensor of the form."""


def places(model: nn.Module, adapted: Sequence[Unit], tensors: Iterable[str] = ("A", "B")) -> list[Place]:
    """The names under which PEFT stores these tensors of `adapted`."""
    wrappers, tensors = _wrappers(adapted), tuple(tensors)
    out = []
    for unit in adapted:
        path = _path(unit.site.host, wrappers)
        prefix = ".".join(path[: len(path) - _depth(model, adapted, unit)])
        local = _LOOKUP if unit.site.form == "lookup" and not unit.by_parameter else _LORA
        out.append(Place(unit, {tensor: f"{prefix}.{local[tensor]}" for tensor in tensors}))
    return out


def base_key(adapted: Sequence[Unit], name: str) -> str:
    """The name under which PEFT stores a parameter of the base that is trained in full."""
    owner, _, local = name.rpartition(".")
    return ".".join([*_path(owner, _wrappers(adapted)), local])


def base_name(key: str) -> str:
    """Inverse of `base_key`, also for the copies PEFT writes of what it keeps beside a module trained in full."""
    inner = ("base_layer", "modules_to_save", "original_module")
    return ".".join(part for part in key.removeprefix(f"{PREFIX}.").split(".") if part not in inner)


def pack(model: nn.Module, unit: Unit, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A `[…, r, in]` and B `[…, out, r]` as PEFT stores them; what else there is, as it is."""
    out = dict(tensors)
    if unit.by_parameter:
        A, B = (out["B"].mT, out["A"].mT) if _swapped(model, unit) else (out["A"], out["B"])
        if unit.site.copies is not None:
            A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
        out |= {"A": A, "B": B}
    return out


def unpack(model: nn.Module, unit: Unit, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `pack`."""
    out = dict(tensors)
    if unit.by_parameter:
        A, B = out["A"], out["B"]
        if unit.site.copies is not None:
            A, B = A.unflatten(0, (unit.site.copies, -1)), B.unflatten(1, (-1, unit.site.copies)).permute(2, 0, 1)
        out |= {"A": B.mT, "B": A.mT} if _swapped(model, unit) else {"A": A, "B": B}
    return out


def _swapped(model: nn.Module, unit: Unit) -> bool:
    """PEFT takes a raw matrix for `[out, in]`, a stack for what the module's `is_transposed` says; we know its use."""
    theirs = unit.site.copies is not None and bool(getattr(model.get_submodule(unit.site.host), "is_transposed", False))
    return unit.site.transposed != theirs


def _wrappers(adapted: Iterable[Unit]) -> Counter[str]:
    return Counter(unit.site.host for unit in adapted)


def _depth(model: nn.Module, adapted: Sequence[Unit], unit: Unit) -> int:
    """How many `base_layer` at the end of the host's path lie below this unit's own wrapper."""
    order = list(model.get_submodule(unit.site.host)._parameters)
    same = [other.site.slot for other in adapted if other.site.host == unit.site.host]
    same.sort(key=lambda slot: order.index(slot) if slot in order else -1)
    return same.index(unit.site.slot) + 1


def _path(module: str, wrappers: Counter[str]) -> list[str]:
    parts, name = [PREFIX, *["base_layer"] * wrappers[""]], ""
    for part in module.split(".") if module else ():
        name = f"{name}.{part}" if name else part
        parts += [part, *["base_layer"] * wrappers[name]]
    return parts
