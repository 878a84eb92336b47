"""Progress of long work: silent for two seconds, and always where nobody watches."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
PATIENCE = 2.0

_displays: list[str] = []  # two at once would write over each other


@contextmanager
def _alone(label: str) -> Iterator[None]:
    _displays.append(label)
    try:
        yield
    finally:
        _displays.pop()


@contextmanager
def status(text: str) -> Iterator[None]:
    """Says what is being done while the body runs, on a terminal where nothing else is shown, and vanishes with it."""
    if _displays or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with _alone(text), Console(stderr=True).status(text):
        yield


def shown(items: Iterable[T], label: str, total: int | None) -> Iterator[T]:
    """`items`, with a bar on standard error once they have taken longer than `PATIENCE` seconds on a terminal."""
    iterator, started, done = iter(items), time.monotonic(), 0
    if sys.stderr.isatty() and not _displays:
        for item in iterator:
            yield item
            done += 1
            if time.monotonic() - started > PATIENCE:
                break
        else:
            return
        from rich.console import Console
        from rich.progress import Progress

        with _alone(label), Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(label, total=total, completed=done)
            for item in iterator:
                yield item
                bar.advance(task)
        return
    yield from iterator
