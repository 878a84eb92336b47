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

    active: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()

    def attach(self, name: str, adapter: nn.Module) -> None:
        if name in self._modules:
            raise AdapterError(f"an adapter named {name!r} is here already")
        self._modules[name] = adapter

    def detach(self, name: str) -> None:
        del self._modules[name]
        self.active = tuple(other for other in self.active if other != name)

    def __getitem__(self, name: str) -> Any:
        return self._modules[name]

    def __contains__(self, name: str) -> bool:
        return name in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def live(self) -> list[Any]:
        """The adapters a forward applies, in order."""
        return [self._modules[name] for name in self.live_names()]

    def live_names(self) -> tuple[str, ...]:
        return tuple(name for name in self.active if name not in self.merged) if self.merged else self.active


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
