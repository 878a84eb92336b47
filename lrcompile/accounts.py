"""What the compiler did to a model's graphs, for people to read: kept beside the model, which a copy of it is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from torch import nn

if TYPE_CHECKING:
    from lrcompile.passes.base import Result


@dataclass
class Graph:
    """One captured graph: how many operations it had, how many of adapters, and what each pass made of them."""

    operations: int
    adapters: int
    results: list[tuple[str, Result]] = field(default_factory=list)
    """By pass, for the graph and every body in it."""

    def __str__(self) -> str:
        done: Counter[str] = Counter()
        left: dict[tuple[str, str], list[str]] = {}
        for name, result in self.results:
            done[name] += result.count
            for refusal in result.refusals:
                left.setdefault((name, refusal.reason), []).append(refusal.node)
        parts = [f"{self.operations} operations, {self.adapters} of adapters"]
        parts += [f"{name}: {count}" for name, count in done.items() if count]
        parts += [f"{name} left {len(nodes)}, as {why} ({_some(nodes)})" for (name, why), nodes in left.items()]
        return "; ".join(parts)


def _some(nodes: Sequence[str]) -> str:
    return ", ".join(nodes[:3]) + (", …" if len(nodes) > 3 else "")


_graphs: WeakKeyDictionary[nn.Module, list[Graph]] = WeakKeyDictionary()


def keep(model: nn.Module, graphs: list[Graph]) -> None:
    """From now on `graphs`, which compiling goes on to fill, are those of `model`."""
    _graphs[model] = graphs


def graphs_of(model: nn.Module) -> tuple[Graph, ...]:
    """Those of the last `compile` of this very model, in the order they were compiled."""
    return tuple(_graphs.get(model, ()))
