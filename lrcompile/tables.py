"""Tables as text: what reports, verdicts and the command line print."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from io import StringIO

from rich import box
from rich.console import Console
from rich.table import Table


def render(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str = "", notes: Iterable[str] = ()
) -> str:
    """The table as plain text, as wide as its content; columns of numbers are aligned to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        numeric = bool(cells) and all(_is_number(row[index]) for row in cells)
        table.add_column(column, justify="right" if numeric else "left", no_wrap=True)
    for row in cells:
        table.add_row(*row)
    out = StringIO()
    Console(file=out, width=10_000, color_system=None, highlight=False, markup=False, emoji=False).print(table)
    body = "\n".join(line.rstrip() for line in out.getvalue().splitlines() if line.strip())
    return "\n".join(part for part in (title, body, *(f"· {note}" for note in notes)) if part)


def _is_number(cell: str) -> bool:
    text = cell.strip().rstrip("%×KMGiB ").replace(",", "")
    if text in ("", "-"):
        return True
    try:
        float(text)
    except ValueError:
        return False
    return True
