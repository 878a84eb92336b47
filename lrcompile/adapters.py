"""The adapters a model carries: by name for each weight, by slot for each host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from lrcompile.errors import AdapterError

ADAPTERS = "lrcompile_adapters"
"""Attribute under which a host keeps its adapter sets, by slot."""


class AdapterSet(nn.Module):
    """The adapters of one weight by name. `active` ones act now, in order; `merged` ones act through the weight."""

    live: tuple[Any, ...]
    """The adapters a forward applies, in order. Modules, not names: a compiled forward depends on what it reads, and
    one that read names would have to be compiled again for an adapter that only has another name."""

    def __init__(self) -> None:
        super().__init__()
        self._active: tuple[str, ...] = ()
        self._merged: tuple[str, ...] = ()
        self._choose()

    @property
    def active(self) -> tuple[str, ...]:
        return self._active

    @active.setter
    def active(self, names: tuple[str, ...]) -> None:
        self.__dict__["_active"] = names
        self._choose()

    @property
    def merged(self) -> tuple[str, ...]:
        return self._merged

    @merged.setter
    def merged(self, names: tuple[str, ...]) -> None:
        self.__dict__["_merged"] = names
        self._choose()

    def _choose(self) -> None:
        self.__dict__["live"] = tuple(self._modules[name] for name in self.live_names())

    def attach(self, name: str, adapter: nn.Module) -> None:
        if name in self._modules:
            raise AdapterError(f"an adapter named {name!r} is here already")
        self._modules[name] = adapter

    def detach(self, name: str) -> None:
        del self._modules[name]
        self.active = tuple(other for other in self._active if other != name)

    def __getitem__(self, name: str) -> Any:
        return self._modules[name]

    def __contains__(self, name: str) -> bool:
        return name in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def live_names(self) -> tuple[str, ...]:
        return tuple(name for name in self._active if name not in self._merged) if self._merged else self._active


RESERVED = frozenset(dir(AdapterSet()))
"""What an adapter cannot be called, because its tensors are reached by attribute."""


class AdapterSlots(nn.Module):
    """The adapter sets of one host by slot: an `nn.ModuleDict` without methods, as a parameter may be called `keys`."""

    def __setitem__(self, slot: str, adapters: AdapterSet) -> None:
        self._modules[slot] = adapters

    def __getitem__(self, slot: str) -> Any:
        return self._modules[slot]

    def __delitem__(self, slot: str) -> None:
        del self._modules[slot]

    def __contains__(self, slot: str) -> bool:
        return slot in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)
