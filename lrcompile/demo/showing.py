"""What a run shows while it works: one line a stage with its time, a bar with the loss for those that take steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINES = 8  # of a stage with steps, where there is no terminal to draw a bar on


class Show:
    """Stages on `console`; keeps each one's seconds for the results."""

    def __init__(self, console: Console):
        self.console = console
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        started = time.perf_counter()
        if self.console.is_terminal:
            with self.console.status(title):
                yield
        else:
            yield
        self._done(title, started, "")

    @contextmanager
    def steps(self, title: str, total: int) -> Iterator[Callable[[int, float], None]]:
        """Yields `tick(step, loss)`, steps counted from 1; a loss of nan is not shown."""
        started = time.perf_counter()
        last = [0.0]
        with self._ticker(title, total, started) as show:

            def tick(step: int, loss: float) -> None:
                # the loss of one small batch is noisy; this is its running mean
                last[0] = loss if step == 1 else 0.9 * last[0] + 0.1 * loss
                show(step, last[0])

            yield tick
        self._done(title, started, f"{total} steps{_loss(last[0])}")

    @contextmanager
    def _ticker(self, title: str, total: int, started: float) -> Iterator[Callable[[int, float], None]]:
        if not self.console.is_terminal:

            def line(step: int, loss: float) -> None:
                if step % max(1, total // LINES) == 0 and step < total:
                    self.console.print(
                        f"    {title}: {step}/{total}{_loss(loss)}, {time.perf_counter() - started:.0f} s"
                    )

            yield line
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.fields[loss]}"), console=self.console, transient=True) as bar:
            task = bar.add_task(title, total=total, loss="")
            yield lambda step, loss: bar.update(task, completed=step, loss=_loss(loss).removeprefix(", "))

    def _done(self, title: str, started: float, more: str) -> None:
        self.seconds[title] = round(time.perf_counter() - started, 2)
        self.console.print(f"  {title}" + (f": {more}" if more else "") + f" ({self.seconds[title]:.1f} s)")


def _loss(loss: float) -> str:
    return "" if math.isnan(loss) else f", loss {loss:.3f}"
