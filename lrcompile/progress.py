"""Progress of long work: silent for two seconds, and always where nobody watches."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
PATIENCE = 2.0


def shown(items: Iterable[T], label: str, total: int | None) -> Iterator[T]:
    """`items`, with a bar on standard error once they have taken longer than `PATIENCE` seconds on a terminal."""
    iterator, started, done = iter(items), time.monotonic(), 0
    if sys.stderr.isatty():
        for item in iterator:
            yield item
            done += 1
            if time.monotonic() - started > PATIENCE:
                break
        else:
            return
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(label, total=total, completed=done)
            for item in iterator:
                yield item
                bar.advance(task)
        return
    yield from iterator
