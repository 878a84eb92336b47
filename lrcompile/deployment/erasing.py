"""What rounding takes of an update that is folded while a file is written: measured before, as `merge` measures it."""

from __future__ import annotations

import torch

from lrcompile.errors import ExportError
from lrcompile.mergeable import LIMIT
from lrcompile.passes.base import Pending, Program
from lrcompile.progress import shown


def refuse_erased(program: Program) -> None:
    """Raise ExportError if ‖round(W + Δ) − (W + Δ)‖ is more than half of ‖Δ‖ at a weight. One is formed at a time, and
    none that is not rounded to 16 bits.
    """
    lost = {
        name: share
        for name, weight in shown(program.pending.items(), "measuring what rounding takes", len(program.pending))
        if weight.dtype.itemsize < 4 and (share := _lost(weight)) > LIMIT
    }
    if not lost:
        return
    worst, *others = sorted(lost, key=lambda name: -lost[name])
    dtype = str(program.pending[worst].dtype).removeprefix("torch.")
    more = f", also at {', '.join(others[:8])}{', …' if others[8:] else ''}" if others else ""
    raise ExportError(
        f"rounding to {dtype} would take {lost[worst]:.0%} of the update at {worst} (more than {LIMIT:.0%} at"
        f" {len(lost)} weights in all{more}). Keep each pair beside its weight with adapters='inline' (exact), export a"
        " float32 copy (model.float()), or accept it: lrcompile.merge(model, limit=…), then export what that leaves"
    )


def _lost(weight: Pending) -> float:
    """‖round(W + Δ) − (W + Δ)‖/‖Δ‖; 0 where nothing is folded in."""
    base = weight.base()
    meant = base.to(torch.promote_types(base.dtype, torch.float32), copy=True)
    for update in weight.updates:
        update(meant, base)
    size = float(torch.linalg.vector_norm(meant - base.to(meant.dtype)))
    return float(torch.linalg.vector_norm(meant.to(weight.dtype) - meant)) / size if size else 0.0
