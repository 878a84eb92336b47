"""Calibrations: what a method measures on the user's data before its factors start. A recipe names one as a class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from lrcompile.batches import Loss
from lrcompile.sites.site import Site
from lrcompile.specs import Spec


class Calibration(ABC):
    """Runs `model`, adapters that are active included, on data and measures something at each of `sites`.

    The model is afterwards what it was: modes, gradients, `requires_grad`, buffers, random state. `notes` says what the
    user should know of the measurement (fewer batches than asked for, say).
    """

    def __init__(self, model: nn.Module, spec: Spec, sites: Sequence[Site]):
        self.model, self.spec, self.sites = model, spec, tuple(sites)
        self.notes: list[str] = []

    @classmethod
    def refusal(cls, site: Site) -> str | None:
        """Why nothing can be measured at `site`; None if it can."""
        return None

    @abstractmethod
    def run(self, data: Iterable[Any], loss: Loss | None) -> tuple[Spec, Mapping[str, Any]]:
        """The spec, with what was decided on the way, and by site name what was measured: tensors on the host, in
        float32 (float64 for a float64 base).
        """

    def _note_batches(self, seen: int) -> None:
        if seen < self.spec.batches:
            self.notes.append(f"{self.spec.method} measured on {seen} batches; data held no more of the"
                              f" {self.spec.batches} asked for")  # fmt: skip
