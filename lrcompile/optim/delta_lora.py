"""Delta-LoRA's start: the step from which the weight follows the pair."""

from __future__ import annotations

from collections.abc import Iterator

from lrcompile.errors import AdapterError
from lrcompile.optim.rule import Rule, Step
from lrcompile.recipes.forms.delta import DeltaAdapter
from lrcompile.sites.site import Site
from lrcompile.state import state_of
from lrcompile.switching import rewrite_graphs


class Follow(Rule):
    """A₀, B₀ ← A, B at the end of step K + 1: W is W₀ so far, and moves by λ·s·(BₜAₜ − Bₜ₋₁Aₜ₋₁) in each later step t.

    K is the spec's `start_step`. The paper's algorithm (arXiv 2309.02411, as others transcribed it) counts steps from 0
    and writes Wₜ₊₁ for t > K; the first such t is K + 1, and P_{K+1}, the product after K + 1 steps, is what the sums
    start from. The paper's λ and K by task could not be verified, so both are required fields. An adapter that follows
    already (loaded to be trained on) goes on following.
    """

    def before_step(self, step: Step) -> None:
        if step.number > self.spec.start_step + 1:
            for site, adapter in self._pairs():
                if not adapter.follows:
                    raise AdapterError(
                        f"the optimizer has taken {step.number - 1} steps, and the weight at {site.name!r} does not"
                        f" follow yet, though it should since step {self.spec.start_step + 1}: resume with the state of"
                        " the model too, or with a new optimizer"
                    )

    def after_step(self, step: Step) -> None:
        if step.number == self.spec.start_step + 1:
            for _, adapter in self._pairs():
                if not adapter.follows:
                    adapter.follow()
            rewrite_graphs(self.model, state_of(self.model).sites[self.name])

    def _pairs(self) -> Iterator[tuple[Site, DeltaAdapter]]:
        for site, adapter in self.adapters():
            assert isinstance(adapter, DeltaAdapter)  # the recipe's form
            yield site, adapter
