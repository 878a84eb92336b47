"""`report`: one row a site, what was left alone and why, what trains, what it costs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lrcompile import accounts, residuals, walking, written
from lrcompile.errors import require
from lrcompile.int8.modules import holder_of, is_int8
from lrcompile.state import adapter_set, state_of, tensors_at
from lrcompile.tables import render
from lrcompile.wording import sized
from lrcompile.wrapping import within


@dataclass(frozen=True)
class Row:
    name: str
    kind: str
    in_features: int
    out_features: int
    rank: int | None
    adapted: bool
    dead: bool | None
    """No gradient reaches it; None as long as nobody looked (the first optimizer step does, or
    `apply(example_inputs=…)`).
    """
    reason: str
    """Why it is not adapted, or what else is to be said."""
    added: int = 0
    """Numbers that adapters add here."""


@dataclass(frozen=True)
class Report:
    """Sites, adapters and totals of an adapted model; prints as a table."""

    sites: tuple[Row, ...]
    adapters: tuple[str, ...]
    active: tuple[str, ...]
    merged: tuple[str, ...]
    trainable: int
    """Trainable numbers, fully trained parameters included."""
    total: int
    """All numbers of the model, adapters included; an NF4 code counts as two."""
    trainable_bytes: int
    base_bytes: int
    notes: tuple[str, ...]
    compiled: tuple[str, ...] = ()
    """What `compile` did to each graph, as far as any has been compiled."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        rows = [
            (r.name, r.kind, r.in_features, r.out_features, "-" if r.rank is None else r.rank, _mark(r), r.reason)
            for r in self.sites
        ]
        hit = sum(row.adapted for row in self.sites)
        notes = [*self.notes, *(f"compiled graph {at}: {done}" for at, done in enumerate(self.compiled))]
        title = (
            f"adapters: {', '.join(self.adapters)} (active: {', '.join(self.active) or 'none'}"
            f"{'; merged: ' + ', '.join(self.merged) if self.merged else ''})\n"
            f"sites: {hit} adapted, {len(self.sites) - hit} left alone · trainable: {self.trainable:,} of"
            f" {self.total:,}"
            f" ({self.trainable / max(self.total, 1):.3%}, {sized(self.trainable_bytes)}) · base:"
            f" {sized(self.base_bytes)}"
        )
        return render(("site", "kind", "in", "out", "rank", "adapted", "why"), rows, title=title, notes=notes)

    def plot(self, path: str | Path) -> Path:
        """Draw trainable numbers by site as a picture (PNG, SVG or PDF by suffix)."""
        require("matplotlib", "demo")
        from matplotlib.figure import Figure

        rows = [row for row in self.sites if row.adapted]
        figure = Figure(figsize=(9, max(2.0, 0.22 * len(rows) + 1)), layout="constrained")
        axes = figure.add_subplot()
        numbers = [row.added for row in rows]
        axes.barh([row.name for row in rows], numbers, color=["tab:red" if row.dead else "tab:blue" for row in rows])
        axes.invert_yaxis()
        axes.set_xlabel("trainable numbers (red: no gradient reaches it)")
        axes.tick_params(axis="y", labelsize=7)
        figure.savefig(path, dpi=150)
        return Path(path)


def report(model: nn.Module) -> Report:
    """What lrcompile did to `model`. Raises `AdapterError` if it has no adapter."""
    model = within(model)
    state = state_of(model)
    dead = None if state.dead is None else frozenset(state.dead)
    rows: dict[str, Row] = {}
    for adapter, found in state.sites.items():
        for site in found:
            adapters = adapter_set(model, site)
            copies = f"{site.copies} copies" if site.copies else ""
            rows[site.name] = Row(
                site.name,
                site.kind,
                site.in_features,
                site.out_features,
                adapters[adapter].rank,
                True,
                None if dead is None else any(key in dead for key, _ in tensors_at(model, site, adapter)),
                copies,
                added=sum(p.numel() for _, p in walking.parameters(adapters)),
            )
    for spared in state.spared.values():
        for site, why in spared:
            rows.setdefault(
                site.name, Row(site.name, site.kind, site.in_features, site.out_features, None, False, None, why)
            )
    everything = walking.parameters(model)
    training = [p for _, p in everything if p.requires_grad]
    parameters, buffers = walking.parameters(model, adapters=False), walking.buffers(model, adapters=False)
    int8 = [holder_of(module).held() for _, module in walking.modules(model, adapters=False) if is_int8(module)]
    base = [t for _, t in [*parameters, *buffers]] + [t for held in int8 for t in held]
    codes = [buffer for name, buffer in buffers if name.endswith("weight_codes")]
    return Report(
        sites=tuple(rows.values()),
        adapters=tuple(state.specs),
        active=tuple(state.active),
        merged=state.merged,
        trainable=sum(p.numel() for p in training),
        total=sum(p.numel() for _, p in everything)
        + sum(2 * each.numel() for each in codes)
        + sum(held.codes.numel() for held in int8),
        trainable_bytes=sum(p.numel() * p.element_size() for p in training),
        base_bytes=sum(t.numel() * t.element_size() for t in base),
        notes=(*state.notes, *written.notes_of(model), *residuals.notes_of(model)),
        compiled=tuple(map(str, accounts.graphs_of(model))),
    )


def _mark(row: Row) -> str:
    return ("dead" if row.dead else "yes") if row.adapted else "no"
