"""Passes in order. Timing, dumps and checks hang on one callback; passes know nothing of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lrcompile.passes.base import Pass, Program, Result

Callback = Callable[[Pass, Program], Callable[[Result], None]]
"""Called before a pass; what it returns is called with the result after it."""


@dataclass(frozen=True)
class Step:
    """What one pass of a pipeline did."""

    spec: str
    preserves: str
    result: Result


@dataclass(frozen=True)
class Pipeline:
    """A tuple of passes; `str(pipeline)` is the text `lrcompile.passes.parse` reads."""

    passes: tuple[Pass, ...]

    def run(self, program: Program, callback: Callback | None = None) -> tuple[Step, ...]:
        """Apply every pass to `program`, in order and in place."""
        steps = []
        for each in self.passes:
            after = callback(each, program) if callback is not None else None
            result = each.apply(program)
            if after is not None:
                after(result)
            steps.append(Step(str(each), each.preserves, result))
        return tuple(steps)

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    def __str__(self) -> str:
        return ",".join(map(str, self.passes))


def chain(*callbacks: Callback) -> Callback:
    """Several callbacks as one, called in order before a pass and in reverse after it."""

    def before(each: Pass, program: Program) -> Callable[[Result], None]:
        afters: list[Any] = [callback(each, program) for callback in callbacks]

        def after(result: Result) -> None:
            for one in reversed(afters):
                one(result)

        return after

    return before
