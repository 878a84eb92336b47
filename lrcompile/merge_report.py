"""What a merge did, weight by weight."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lrcompile.effects import Effect
from lrcompile.folding import FoldedSite
from lrcompile.tables import render


@dataclass(frozen=True)
class MergeReport:
    """What a merge did to each weight and bias; prints as a table."""

    sites: tuple[FoldedSite, ...]
    adapters: tuple[str, ...]
    notes: tuple[str, ...] = ()
    outputs: Effect | None = None
    """What is kept of what the active adapters do to the model's outputs on the data; where codes were optimised."""

    @property
    def worst(self) -> FoldedSite | None:
        """None where the adapter is only parameters of the base, which are in place already."""
        return max(self.sites, key=lambda site: site.adapter_relative_error, default=None)

    @property
    def adapter_relative_error(self) -> float:
        """What the limit is held against: of the model's outputs where that was measured, else of the worst site."""
        if self.outputs is not None:
            return self.outputs.error
        return 0.0 if self.worst is None else self.worst.adapter_relative_error

    def to_dict(self) -> dict[str, Any]:
        return {
            "adapters": list(self.adapters),
            "notes": list(self.notes),
            "outputs": None if self.outputs is None else asdict(self.outputs),
            "sites": [{**asdict(s), "adapter_relative_error": s.adapter_relative_error} for s in self.sites],
        }

    def __str__(self) -> str:
        title = f"merged {', '.join(self.adapters)}: "
        if self.worst is None:
            return title + "no weight has an update; what trained in full is in place"
        if self.outputs is not None:
            title += (
                f"{self.outputs.share:.3f} kept of the effect on the model's outputs, error {self.outputs.error:.2e}"
                f" of it (cosine {self.outputs.cosine:.3f}), on the calibration data; "
            )
        title += f"worst adapter-relative error {self.worst.adapter_relative_error:.2e} at {self.worst.name}"
        columns = ["site", "dtype", "‖Δ‖/‖W‖", "error/‖Δ‖", "kept", "cosine"]
        rows = [[s.name, s.dtype, f"{s.relative_size:.2e}", f"{s.adapter_relative_error:.2e}", f"{s.kept.share:.3f}",
                 f"{s.kept.cosine:.3f}"] for s in self.sites]  # fmt: skip
        if any(site.plain is not None for site in self.sites):
            columns += ["nearest codes: error/‖Δ‖", "kept"]
            for row, site in zip(rows, self.sites, strict=True):
                row += ["-", "-"] if site.plain is None else [f"{site.plain.error:.2e}", f"{site.plain.share:.3f}"]
        notes = list(self.notes)
        if outputs := sum(site.measured_on == "outputs" for site in self.sites):
            notes.append(f"{outputs} sites measured on what they put out on the calibration data, others on weights")
        return render(columns, rows, title=title, notes=notes)
