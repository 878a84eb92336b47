"""Which adapters act now on a host that has several slots, some of them perhaps without any."""

from __future__ import annotations

from typing import Any

from torch import nn


def live(host: nn.Module, slot: str) -> tuple[Any, ...]:
    """The adapters to apply after the map of `slot`, in order."""
    sets: Any = host._modules.get("lrcompile_adapters")
    return sets[slot].live if sets is not None and slot in sets else ()


def any_live(host: nn.Module) -> bool:
    sets: Any = host._modules.get("lrcompile_adapters")
    return sets is not None and any(adapters.live for adapters in sets._modules.values())
