"""The main directions of what comes into each site, and how many of them each site should have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from lrcompile.batches import Loss
from lrcompile.errors import SpecError, TargetError
from lrcompile.recipes.calibration.inputs import Inputs
from lrcompile.recipes.calibration.principal import Principal
from lrcompile.recipes.calibration.ranks import redistributed, with_ranks
from lrcompile.specs import Spec


class Directions(Inputs):
    """The leading principal directions of each site's input, `[rank, in]`, and how many each site should have.

    Incremental, batch by batch (`Principal`), until every direction a site is to have keeps a cosine of at least `tau`
    with what it was a batch before, or `batches` are through. Then the sum of all ranks is dealt out anew, by explained
    variance (`redistributed`), each site getting up to rho times its rank and at least one.

    As in the authors' code (arXiv 2410.07170 and PEFT): the mean is taken off, padding and tokens whose label is −100
    do not count, evaluation mode, B's scale s stays as alpha moves with the rank. Unlike there: at most `batches`
    batches, not as many rounds as it takes; and a site keeps one direction where it would be left without an adapter.
    """

    ignored_label = -100

    def run(self, data: Iterable[Any], loss: Loss | None) -> tuple[Spec, Mapping[str, Tensor]]:
        ranks = {site.name: self.spec.rank_of(site.name) for site in self.sites}
        self._found = {
            site.name: Principal(min(round(self.spec.rho * ranks[site.name]), site.in_features, site.out_features))
            for site in self.sites
        }
        self._budget = sum(ranks.values())
        self.watch(data)
        ratios = self._ratios()
        self._require_enough(ratios)
        dealt = redistributed(ratios, self._budget)
        if moving := [name for name, rank in dealt.items() if not self._found[name].converged(rank, self.spec.tau)]:
            self.notes.append(
                f"{self.spec.method}: at {len(moving)} of {len(dealt)} sites, {moving[0]} among them, the directions"
                f" still moved with the last batch (a cosine below tau={self.spec.tau}); more batches settle them"
            )
        rows = {name: self._found[name].components[:rank].cpu() for name, rank in dealt.items()}
        return with_ranks(self.spec, dealt), rows

    def take(self, name: str, x: Tensor) -> None:
        self._found[name].take(x)

    def settled(self) -> bool:
        ratios = self._ratios()
        if self._lacking(ratios):
            return False
        dealt = redistributed(ratios, self._budget)
        return all(self._found[name].converged(rank, self.spec.tau) for name, rank in dealt.items())

    def _ratios(self) -> dict[str, Tensor]:
        return {name: found.explained() for name, found in self._found.items()}

    def _lacking(self, ratios: Mapping[str, Tensor]) -> bool:
        return not all(map(len, ratios.values())) or sum(map(len, ratios.values())) < self._budget

    def _require_enough(self, ratios: Mapping[str, Tensor]) -> None:
        if flat := [name for name, ratio in ratios.items() if not len(ratio)]:
            raise TargetError(f"the input of {flat[0]!r} is the same for every token, so it has no main directions")
        if self._lacking(ratios):
            raise SpecError(
                f"the inputs of all sites together span {sum(map(len, ratios.values()))} directions on this data, fewer"
                f" than the sum of ranks ({self._budget}); give more or larger batches, or lower rank",
                field="data",
            )
