"""A verdict as one HTML page: numbers, error along depth, effect kept at each site, sizes, settings. No network."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from types import SimpleNamespace
from typing import Any

from lrcompile.errors import VerificationError, require
from lrcompile.verifying.intermediates import ENTERING
from lrcompile.verifying.verdict import Place, Verdict
from lrcompile.wording import sized
from lrcompile.writing import atomic_file

_INK, _ACCENT, _PALE = "#1f3b57", "#d1652a", "#9db4c8"
_MOST_LABELS = 80


@dataclass(frozen=True)
class Picture:
    title: str
    caption: str
    svg: str


def write_page(verdicts: Sequence[Verdict], path: str | os.PathLike[str]) -> None:
    """Write the page of one or several verdicts, atomically; every text in it is escaped."""
    jinja2 = require("jinja2", "demo")
    require("matplotlib", "demo")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"number": _number, "settings": _settings}
    source = resources.files("lrcompile.verifying").joinpath("templates", "page.html").read_text(encoding="utf-8")
    ok = all(verdict.ok for verdict in verdicts)
    title = verdicts[0].name if len(verdicts) == 1 and verdicts[0].name else "lrcompile verify"
    text = environment.from_string(source).render(verdicts=[_shown(each) for each in verdicts], ok=ok, title=title)
    with atomic_file(path, error=VerificationError) as file:
        file.write_text(text, encoding="utf-8")


def _shown(verdict: Verdict) -> SimpleNamespace:
    shown = SimpleNamespace(**{key: getattr(verdict, key) for key in verdict.__dataclass_fields__})
    shown.sizes = {name: "-" if size is None else sized(size) for name, size in verdict.sizes.items()}
    shown.pictures = list(filter(None, (_depth(verdict), _effect(verdict), _sizes(verdict))))
    return shown


def _depth(verdict: Verdict) -> Picture | None:
    places = [place for place in verdict.places if not place.name.startswith(ENTERING)]
    if not places:
        return None
    figure, axes = _figure(len(places))
    floor = 1e-3
    at = range(len(places))
    for values, colour, marker, label in (
        ([place.bound_ratio for place in places], _INK, "o", "whole error, r"),
        ([place.local_ratio for place in places], _ACCENT, "D", "its own share, r of the place alone"),
    ):
        shown = [(min(max(value, floor), 1e12), y) for y, value in zip(at, values, strict=True) if value is not None]
        if shown:
            axes.plot(*zip(*shown, strict=True), color=colour, marker=marker, markersize=4, linewidth=1, label=label)
    axes.axvline(verdict.limits.bound_ratio, color="#b3261e", linestyle="--", linewidth=1, label="limit")
    axes.set_xscale("log")
    axes.set_xlabel("error in units of the place's own bound D")
    axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    _names(axes, places)
    caption = (
        "From the first place (top) to the last. Where the whole error rises and the own share does not, the error is "
        "inherited; where the own share leaves the limit, this place is at fault."
    )
    return Picture("Error along depth", caption, _svg(figure))


def _effect(verdict: Verdict) -> Picture | None:
    places = [place for place in verdict.places if place.effect_cosine is not None]
    if not places:
        return None
    figure, axes = _figure(len(places))
    kept = [place.effect_cosine for place in places]
    axes.barh(range(len(places)), kept, color=_PALE, height=0.6, label="cosine kept")
    lost = [min(place.effect_error or 0.0, 2.0) for place in places]
    axes.plot(lost, range(len(places)), "D", color=_ACCENT, markersize=5, label="off by this share, ‖error‖ / ‖effect‖")
    limit = verdict.limits.adapter_relative_error
    axes.axvline(limit, color="#b3261e", linestyle="--", linewidth=1, label="limit of the share")
    axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    _names(axes, places)
    caption = "Of what the adapter changes there: cosine 1 is all of it, 0 nothing. Shares over 2 stand at 2."
    return Picture("Effect of the adapter kept, per site", caption, _svg(figure))


def _sizes(verdict: Verdict) -> Picture | None:
    sizes = {name: size for name, size in verdict.sizes.items() if size}
    if len(sizes) < 2:
        return None
    figure, axes = _figure(len(sizes))
    bars = axes.barh(range(len(sizes)), [size / 2**20 for size in sizes.values()], color=_INK, height=0.6)
    axes.bar_label(bars, [sized(size) for size in sizes.values()], padding=3, fontsize=8)
    axes.set_yticks(range(len(sizes)), [_plain(name) for name in sizes])
    axes.invert_yaxis()
    axes.set_xlabel("MiB")
    axes.set_xlim(0, 1.25 * max(sizes.values()) / 2**20)
    return Picture("Size", "Tensors of a module, files of an artefact.", _svg(figure))


def _figure(rows: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.1 + min(0.2 * rows, 24)), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#e5e5e5")
    axes.set_axisbelow(True)
    return figure, axes


def _names(axes: Any, places: Sequence[Place]) -> None:
    step = 1 + (len(places) - 1) // _MOST_LABELS
    at = range(0, len(places), step)
    axes.set_yticks(at, [_plain(places[index].name) for index in at], fontsize=7)
    axes.set_ylim(len(places) - 0.5, -0.5)


def _plain(name: str) -> str:
    return name.replace("$", r"\$")  # between two of them matplotlib reads mathematics


def _svg(figure: Any) -> str:
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "lrcompile"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) and math.isfinite(value) else str(value)


def _settings(value: Mapping[str, Any]) -> str:
    return json.dumps(value, default=str)
