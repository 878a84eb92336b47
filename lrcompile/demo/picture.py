"""The one picture of a run: accuracy, error and cost along the rungs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lrcompile.demo.table import Row
from lrcompile.errors import require

_INK, _ACCENT, _PALE = "#1f3b57", "#d1652a", "#9db4c8"


def draw(rows: list[Row], majority: float, path: Path) -> None:
    """Write a PNG of four panels that share the rungs as their vertical axis."""
    require("matplotlib", "demo")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 1.6 + 0.5 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    accuracy, error, size, latency = figure.subplots(1, 4, sharey=True, width_ratios=[1.1, 1.3, 1, 1])
    places = range(len(rows))

    _bars(
        accuracy,
        [100 * row.accuracy for row in rows],
        "{:.1f}",
        [_PALE if row.key == "frozen" else _INK for row in rows],
    )
    accuracy.axvline(100 * majority, color="grey", linestyle=":", linewidth=1)
    accuracy.annotate("most frequent class", (100 * majority, 1.0), xycoords=("data", "axes fraction"), fontsize=8,
                      color="grey", ha="center", va="bottom")  # fmt: skip
    accuracy.set_xlim(0, 112)
    accuracy.set_title("Test accuracy, %", pad=20)
    accuracy.set_yticks(places, [row.title for row in rows])
    accuracy.invert_yaxis()

    for values, marker, colour, label in (
        (
            [row.max_abs_error for row in rows],
            "o",
            _INK,
            "largest |error| of a logit\nagainst the float64 of its own reference",
        ),
        (
            [row.adapter_relative_error for row in rows],
            "D",
            _ACCENT,
            "error / adapter's effect,\nagainst the trained model",
        ),
    ):
        shown = [(value, place) for place, value in enumerate(values) if value]
        error.scatter(
            *zip(*shown, strict=True) if shown else ([], []), marker=marker, color=colour, label=label, zorder=3
        )
    error.set_xscale("log")
    error.set_title("Error (log scale)", pad=20)
    error.grid(axis="x", color="#e5e5e5")
    error.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08), frameon=False)

    _bars(size, [row.size_bytes / 2**20 for row in rows], "{:.0f}", _INK)
    size.set_title("Files, MiB", pad=20)
    _bars(latency, [row.latency_ms for row in rows], "{:.0f}", _INK)
    latency.set_title("Latency, ms a batch", pad=20)
    for axes in (accuracy, error, size, latency):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def _bars(axes: Any, values: list[float], form: str, colour: Any) -> None:
    bars = axes.barh(range(len(values)), values, color=colour, height=0.6)
    axes.bar_label(bars, [form.format(value) for value in values], padding=3, fontsize=9)
    axes.set_xlim(0, 1.18 * max(values))
