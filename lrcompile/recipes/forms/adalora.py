"""AdaLoRA's triplets: a row of A, a column of B and the number between them, which a budget can set to 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from lrcompile.errors import SpecError
from lrcompile.recipes.forms.adapter import Start
from lrcompile.recipes.forms.pair import LowRank
from lrcompile.sites.site import Site
from lrcompile.specs import Spec

DEVIATION = 0.02


class TripletAdapter(LowRank):
    """Δ = s·B·diag(E)·A = s·B·(A ⊙ E)  (arXiv 2303.10512): A `[rank, in]`, E `[rank, 1]`, B `[out, rank]`.

    A, B ~ N(0, 0.02²) and E = 0. A triplet whose E is 0 adds nothing, and its A and B get no gradient; that of E says
    what it would be worth, so it may come back as long as the budget is not final.
    """

    A: Tensor
    B: Tensor
    E: Tensor

    @classmethod
    def shapes(cls, in_features: int, out_features: int, rank: int) -> Mapping[str, tuple[int, ...]]:
        return {"A": (rank, in_features), "E": (rank, 1), "B": (out_features, rank)}

    @classmethod
    def demand(cls, spec: Spec, sites: Sequence[Site]) -> None:
        maps = [(spec.rank_of(site.name), site.copies or 1) for site in sites]
        start, target = sum(rank * n for rank, n in maps), spec.target_rank * sum(n for _, n in maps)
        if target > start:
            raise SpecError(
                f"target_rank={spec.target_rank} asks for {target} ranks in all, but the {len(sites)} sites start with"
                f" {start} (rank_pattern lowers some); the budget only shrinks: lower target_rank",
                field="target_rank",
            )

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A * self.E, self.B

    def begin(self, start: Start) -> None:
        self.A.normal_(0, DEVIATION, generator=start.generator)
        self.B.normal_(0, DEVIATION, generator=start.generator)
        self.E.zero_()
