"""The covariance of what comes into each site."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from lrcompile.batches import Loss
from lrcompile.errors import TargetError
from lrcompile.recipes.calibration.inputs import Inputs
from lrcompile.specs import Spec
from lrcompile.watching import SecondMoments


class Covariance(Inputs):
    """C = 1/T·Σₜ xₜxₜᵀ `[in, in]` over all T tokens that come into a site (not centred).

    The sums take 4·in² bytes of host memory a site. For a mean over tokens the unit of C does not depend on the amount
    of data; the official code of CorDA (arXiv 2406.05223) divides each sample by its largest value first and adds up.
    """

    def run(self, data: Iterable[Any], loss: Loss | None) -> tuple[Spec, Mapping[str, Tensor]]:
        self._found = SecondMoments()
        self.watch(data)
        means = self._found.means()
        for name, mean in means.items():
            if not mean.diagonal().any():
                raise TargetError(f"the input of {name!r} is zero on all of this data, so it has no main directions")
        return self.spec, means

    def take(self, name: str, x: Tensor) -> None:
        self._found.take(name, x)
