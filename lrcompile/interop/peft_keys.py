"""Names and layouts of tensors in PEFT's `adapter_model.safetensors`, both ways.

PEFT wraps what it adapts: a module `m` becomes `m` with the original at `m.base_layer`, so every name below it grows
by one `base_layer` for each wrapper. Two raw parameters of one module are two wrappers, the first registered
innermost. A stack of E experts is flat:

    lora_A [E·r, in], expert slowest          lora_B [out, r·E], expert fastest
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lrcompile.interop.peft_matching import Unit

PREFIX = "base_model.model"


@dataclass(frozen=True)
class Pair:
    """The two tensors of one site."""

    unit: Unit
    A: str
    B: str


def pairs(model: nn.Module, adapted: Sequence[Unit]) -> list[Pair]:
    """The names under which PEFT stores the factors of `adapted`."""
    wrappers = _wrappers(adapted)
    out = []
    for unit in adapted:
        site = unit.site
        depth = _depth(model, adapted, unit)
        path = _path(site.host, wrappers)
        prefix = ".".join(path[: len(path) - depth])
        if site.form == "lookup" and not unit.by_parameter:
            out.append(Pair(unit, f"{prefix}.lora_embedding_A", f"{prefix}.lora_embedding_B"))
        else:
            out.append(Pair(unit, f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"))
    return out


def base_key(adapted: Sequence[Unit], name: str) -> str:
    """The name under which PEFT stores a parameter of the base that is trained in full."""
    owner, _, local = name.rpartition(".")
    return ".".join([*_path(owner, _wrappers(adapted)), local])


def base_name(key: str) -> str:
    """Inverse of `base_key`, also for the copies PEFT writes of what it keeps beside a module trained in full."""
    inner = ("base_layer", "modules_to_save", "original_module")
    return ".".join(part for part in key.removeprefix(f"{PREFIX}.").split(".") if part not in inner)


def pack(model: nn.Module, unit: Unit, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """(A `[…, r, in]`, B `[…, out, r]`) as PEFT stores them."""
    if not unit.by_parameter:
        return A, B
    if _swapped(model, unit):
        A, B = B.mT, A.mT
    if unit.site.copies is None:
        return A, B
    return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)


def unpack(model: nn.Module, unit: Unit, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of `pack`."""
    if not unit.by_parameter:
        return A, B
    if unit.site.copies is not None:
        A, B = A.unflatten(0, (unit.site.copies, -1)), B.unflatten(1, (-1, unit.site.copies)).permute(2, 0, 1)
    return (B.mT, A.mT) if _swapped(model, unit) else (A, B)


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
