"""Passes in order. Timing, dumps and checks hang on one callback; passes know nothing of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lrcompile.errors import SpecError
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
    """A tuple of passes of one stage; `str(pipeline)` is the text `lrcompile.passes.parse` reads."""

    passes: tuple[Pass, ...]

    def __post_init__(self) -> None:
        stages = {each.stage: each.name for each in self.passes}
        if len(stages) > 1:
            mixed = " and ".join(f"{name!r} ({stage})" for stage, name in stages.items())
            raise SpecError(f"a pipeline rewrites graphs of one stage, and {mixed} differ", field="passes")

    def run(self, program: Program, callback: Callback | None = None) -> tuple[Step, ...]:
        """Apply every pass to the captured `program`, in order and in place."""
        if foreign := [each for each in self.passes if each.stage != "export"]:
            raise SpecError(
                f"pass {foreign[0].name!r} rewrites a graph that is being compiled for training; a captured program"
                " takes passes of the export stage (see: lrcompile passes)",
                field="passes",
            )
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
