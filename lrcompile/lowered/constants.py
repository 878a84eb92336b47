"""What a compiled function is given besides its inputs: values of weights, computed once for each of their states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lrcompile.cached import State, constant, hold, states_of


@dataclass(frozen=True)
class Input:
    """The input of a graph at a position."""

    index: int


@dataclass(frozen=True)
class Constant:
    """f(inputs), a tensor without history that changes only when one of those does."""

    function: Callable[..., Tensor]
    args: tuple[Any, ...]
    """An `Input` where the function takes a tensor."""
    example: Tensor
    """A fake value."""

    def of(self, inputs: Sequence[Any]) -> Tensor:
        return self.function(*(inputs[each.index] if isinstance(each, Input) else each for each in self.args))

    def reads(self) -> list[int]:
        return [each.index for each in self.args if isinstance(each, Input)]


@dataclass
class _Kept:
    """Of the weights of one module: their states, and the values they had in them."""

    states: tuple[State, ...]
    held: tuple[StorageWeakRef, ...]
    values: list[Tensor]


@dataclass
class WithConstants:
    """`compiled(*inputs, *values)` for `inputs`; a value is computed again when one of what it reads may have changed.

    One graph may serve many modules (blocks of a model): the values of each are kept apart, as long as its weights
    live, and keep no weight alive.
    """

    compiled: Callable[..., Any]
    constants: tuple[Constant, ...]
    _kept: dict[tuple[int, ...], _Kept] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._reads = sorted({index for each in self.constants for index in each.reads()})
        place = {index: i for i, index in enumerate(self._reads)}
        self._places = [[place[index] for index in each.reads()] for each in self.constants]

    def __call__(self, *inputs: Any) -> Any:
        return self.compiled(*inputs, *self.values(inputs))

    def values(self, inputs: Sequence[Any]) -> list[Tensor]:
        tensors = [inputs[index] for index in self._reads]
        states = states_of(tensors)
        if states is None:
            return [constant(lambda each=each: each.of(inputs)) for each in self.constants]  # type: ignore[misc]
        key = tuple(state.storage for state in states)
        kept = self._kept.get(key)
        if kept is None:
            kept = self._kept[key] = self._first(tensors, states, inputs)
        elif kept.states != states:
            self._again(kept, states, inputs)
        return kept.values

    def _first(self, tensors: Sequence[Tensor], states: tuple[State, ...], inputs: Sequence[Any]) -> _Kept:
        for key in [key for key, each in self._kept.items() if any(ref.expired() for ref in each.held)]:
            del self._kept[key]
        values = [constant(lambda each=each: each.of(inputs)) for each in self.constants]  # type: ignore[misc]
        return _Kept(states, hold(tensors), values)

    def _again(self, kept: _Kept, states: tuple[State, ...], inputs: Sequence[Any]) -> None:
        changed = {i for i, (old, new) in enumerate(zip(kept.states, states, strict=True)) if old != new}
        for i, (each, places) in enumerate(zip(self.constants, self._places, strict=True)):
            if changed.intersection(places):
                kept.values[i] = constant(lambda each=each: each.of(inputs))  # type: ignore[misc]
        kept.states = states
