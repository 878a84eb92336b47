"""The repeated blocks of a model: what a compiler needs to see once, however many there are."""

from __future__ import annotations

from torch import nn

from lrcompile.adapters import AdapterSlots
from lrcompile.hosting import original_class


def repeated(model: nn.Module) -> list[list[nn.Module]]:
    """The blocks of each kind: children of one list (`nn.ModuleList`, `nn.Sequential`) and of one class, two or more.

    Outermost ones; a single layer is no block.
    """
    if isinstance(model, (nn.ModuleList, nn.Sequential)):
        kinds: dict[type, list[nn.Module]] = {}
        for child in model:
            if _has_parts(child):
                kinds.setdefault(original_class(child), []).append(child)
        found = [kind for kind in kinds.values() if len(kind) > 1]
    else:
        found = []
    taken = {id(block) for kind in found for block in kind}
    for child in model.children():
        if id(child) not in taken and not isinstance(child, AdapterSlots):
            found += repeated(child)
    return found


def _has_parts(module: nn.Module) -> bool:
    """Is it called, and made of modules that are?"""
    called = type(module).forward is not nn.Module.forward
    return called and any(not isinstance(child, AdapterSlots) for child in module.children())


def differing_numbers(blocks: list[nn.Module]) -> set[str]:
    """The attributes of blocks of one kind, or of their parts, in which they differ by a whole number: an index."""
    first, *others = [dict(block.named_modules()) for block in blocks]
    return {
        attribute
        for other in others
        for name, module in other.items()
        if name in first
        for attribute, value in vars(module).items()
        if type(value) is int and type(before := vars(first[name]).get(attribute)) is int and before != value
    }
