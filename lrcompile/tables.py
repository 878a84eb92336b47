"""Tables as text: what reports, verdicts and the command line print."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest

from rich.cells import cell_len

GAP = "   "


def render(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str = "", notes: Iterable[str] = ()
) -> str:
    """The table as plain text, as wide as its content; columns of numbers are aligned to the right.

    Made by hand, as `rich` takes half a millisecond a row, and a report of a large model has a thousand.
    """
    cells = [[str(cell).expandtabs() for cell in row] for row in rows]
    # a cell of several lines makes as many of its row
    lines = [line for row in cells for line in zip_longest(*(cell.split("\n") for cell in row), fillvalue="")]
    lines = [tuple(columns), *lines]
    widths = [max(map(_width, column)) for column in zip(*lines, strict=True)]
    numeric = [bool(cells) and all(map(_is_number, column)) for column in zip(*cells, strict=True)]
    right = numeric or [False] * len(widths)
    aligned = [GAP.join(map(_aligned, line, widths, right)).rstrip() for line in lines]
    rule = "─" * (sum(widths) + len(GAP) * (len(widths) - 1))
    body = [f" {line}" for line in (aligned[0], rule, *aligned[1:]) if line]
    return "\n".join(part for part in (title, *body, *(f"· {note}" for note in notes)) if part)


def _width(cell: str) -> int:
    return len(cell) if cell.isascii() else cell_len(cell)


def _aligned(cell: str, width: int, right: bool) -> str:
    blanks = " " * (width - _width(cell))
    return blanks + cell if right else cell + blanks


def _is_number(cell: str) -> bool:
    text = cell.strip().rstrip("%×KMGiB ").replace(",", "")
    if text in ("", "-"):
        return True
    try:
        float(text)
    except ValueError:
        return False
    return True
