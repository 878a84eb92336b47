"""What comes into each site, shown token by token to whatever measures it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from lrcompile.recipes.calibration import Calibration
from lrcompile.sites.site import Site
from lrcompile.watching import watch


class Inputs(Calibration):
    """Shows every site's input, `[tokens, in]`, to `take` (see `watching.watch`). The loss is not needed and not
    called.
    """

    ignored_label: int | None = None
    """Tokens with this entry in the batch's `labels` do not count either."""

    @classmethod
    def refusal(cls, site: Site) -> str | None:
        if site.watchable:
            return None
        return "what comes into it cannot be watched, as it is no nn.Linear or Conv1D that is called as a module"

    def take(self, name: str, x: Tensor) -> None:
        """Look at tokens `[tokens, in]` that come into the site, in float32 or wider."""
        raise NotImplementedError

    def settled(self) -> bool:
        """Asked after each batch: would more of them change nothing?"""
        return False

    def watch(self, data: Iterable[Any]) -> None:
        """Run the model on the data."""
        seen = watch(
            self.model,
            {site.name: site.host for site in self.sites},
            data,
            self.take,
            label=f"{self.spec.method}: inputs",
            most=self.spec.batches,
            seed=self.spec.seed,
            ignored_label=self.ignored_label,
            settled=self.settled,
        )
        if not self.settled():
            self._note_batches(seen)
