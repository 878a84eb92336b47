"""The comparison as a table to read and a picture to look at."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lrcompile.errors import require
from lrcompile.tables import render
from lrcompile.wording import sized

_INK, _ACCENT, _PALE = "#1f3b57", "#d1652a", "#9db4c8"


def table(task: str, found: Mapping[str, Any]) -> str:
    """Best first; an interval that holds LoRA's mean is a difference nobody should quote."""
    rows = []
    for method, row in _ordered(found):
        rows.append(
            (
                method, row["rank"], f"{row['trained']:,}", _rate(row["lr"]), _quality(row),
                "-" if "step_ratio" not in row else "{1:.2f} [{0:.2f}, {2:.2f}]".format(*row["step_ratio"]),
                *(sized(row[key]) if key in row else "-" for key in _BYTES),
            )
        )  # fmt: skip
    arrow = "higher is better" if found["higher_is_better"] else "lower is better"
    columns = (
        "method",
        "rank",
        "trained",
        "lr",
        f"{found['metric']} ± 95 %",
        "step / frozen",
        "optimizer",
        "saved",
        "file",
    )
    notes: tuple[str, ...] = (
        "trained: beside the head, matched from below to LoRA's; lr: best on validation; quality: on test, over seeds",
        "saved: kept for the backward pass beyond what the frozen model keeps; optimizer: its state after a step",
    )
    notes += tuple(f"{method} is left out: {reason}" for method, reason in found.get("skipped", {}).items())
    return render(columns, rows, title=f"{task} ({arrow})", notes=notes)


_BYTES = ("optimizer_bytes", "saved_bytes", "checkpoint_bytes")


def _ordered(found: Mapping[str, Any]) -> list[tuple[str, Any]]:
    sign = -1 if found["higher_is_better"] else 1
    return sorted(found["methods"].items(), key=lambda item: (item[1]["mean"] is None, sign * (item[1]["mean"] or 0)))


def _quality(row: Mapping[str, Any]) -> str:
    if row["mean"] is None:
        return "diverged"
    return f"{row['mean']:.4f}" + (f" ± {row['half_width']:.4f}" if row["half_width"] is not None else "")


def _rate(lr: float | None) -> str:
    return "-" if not lr else f"{lr:g}"


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Quality with its interval, and the step's cost, of every method: one pair of panels a task."""
    require("matplotlib", "demo")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = result["tasks"]
    most = max(len(found["methods"]) for found in tasks.values())
    figure = Figure(figsize=(14, (1.2 + 0.24 * most) * len(tasks)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(tasks), 2, squeeze=False, width_ratios=[1.6, 1])
    for (quality, cost), (name, found) in zip(grid, tasks.items(), strict=True):
        ordered = [(method, row) for method, row in _ordered(found) if row["mean"] is not None]
        places = range(len(ordered))
        means = [row["mean"] for _, row in ordered]
        errors = [row["half_width"] or 0.0 for _, row in ordered]
        colours = [_ACCENT if method == "lora" else _INK for method, _ in ordered]
        quality.errorbar(means, places, xerr=errors, fmt="none", ecolor=_PALE, elinewidth=3, zorder=1)
        quality.scatter(means, places, color=colours, zorder=2)
        quality.set_yticks(places, [f"{method}  (lr {_rate(row['lr'])})" for method, row in ordered], fontsize=8)
        arrow = "higher" if found["higher_is_better"] else "lower"
        quality.set_title(f"{name}: {found['metric']} on test, mean and 95 % interval ({arrow} is better)", fontsize=10)
        ratios = [row["step_ratio"][1] if "step_ratio" in row else 1.0 for _, row in ordered]
        bars = cost.barh(places, ratios, color=colours, height=0.6)
        cost.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios], padding=3, fontsize=7)
        cost.axvline(1.0, color="grey", linewidth=1, linestyle=":")
        cost.set_yticks(places, [])
        cost.set_title("step / frozen step", fontsize=10)
        for axes in (quality, cost):
            axes.invert_yaxis()
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="x", color="#eeeeee")
    figure.savefig(path, dpi=120)
