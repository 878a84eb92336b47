"""The one table a run ends with."""

from __future__ import annotations

from dataclasses import dataclass

from lrcompile.tables import render


@dataclass(frozen=True)
class Row:
    """One rung's numbers; None where a number has no meaning (the baseline is another function, so it has no error)."""

    key: str
    title: str
    accuracy: float
    agreement: float
    """Share of test texts on which it gives the same label as the eager adapter."""
    bound_ratio: float | None
    """r = max |y − y64| / D, y64 the float64 of what this rung means to compute (its `reference`)."""
    max_abs_error: float | None
    adapter_relative_error: float | None
    """‖y − y64‖ / ‖adapter's effect‖, y64 always that of the eager adapter: what the rung has lost of what was
    trained.
    """
    reference: str
    holds: bool | None
    size_bytes: int
    latency_ms: float
    peak_bytes: int


COLUMNS = (
    "rung",
    "accuracy",
    "agreement",
    "r",
    "max |error|",
    "against",
    "error / effect",
    "bound",
    "size",
    "ms/batch",
    "peak",
)


def table(rows: list[Row], notes: list[str]) -> str:
    """Plain text, one line a rung."""
    return render(COLUMNS, [_cells(row) for row in rows], notes=notes)


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.title,
        f"{100 * row.accuracy:.1f} %",
        f"{100 * row.agreement:.1f} %",
        _number(row.bound_ratio, ".2f"),
        _number(row.max_abs_error, ".1e"),
        row.reference or "-",
        _number(row.adapter_relative_error, ".1e"),
        "-" if row.holds is None else "holds" if row.holds else "FAILS",
        f"{row.size_bytes / 2**20:.1f} MiB",
        f"{row.latency_ms:.0f}",
        f"{row.peak_bytes / 2**20:.0f} MiB",
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
