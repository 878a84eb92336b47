"""AdaLoRA (arXiv 2303.10512): a factored SVD whose triplets compete for a shrinking budget.

`rank` is what every site starts with, `target_rank` what it ends with on average; `orth_weight` starts from the
authors' 0.1 (PEFT's default is 0.5). `total_steps` counts optimizer steps: training that ends before is left with the
budget of that moment.
"""

from __future__ import annotations

from typing import Any

from lrcompile.errors import SpecError
from lrcompile.recipes.recipe import REQUIRED, Recipe, integer, number
from lrcompile.recipes.scales import initial_rank


def budgets(spec: Any) -> None:
    """The budget can only shrink, and needs at least one step between warm-up and final phase to do so."""
    if spec.target_rank > spec.rank:
        raise SpecError(
            f"target_rank={spec.target_rank} is above rank={spec.rank}, the rank training starts with; the budget only"
            " shrinks: lower target_rank or raise rank",
            field="target_rank",
        )
    if spec.tinit + spec.tfinal >= spec.total_steps:
        raise SpecError(
            f"total_steps={spec.total_steps} leaves no step between tinit={spec.tinit} and the last"
            f" tfinal={spec.tfinal}; they must sum to less than total_steps",
            field="total_steps",
        )


RECIPE = Recipe(
    name="adalora",
    summary="y = xWᵀ + b + s·((xAᵀ) ⊙ E)Bᵀ, the least important E set to 0 as the budget shrinks",
    paper="2303.10512",
    form="lrcompile.recipes.forms.adalora:TripletAdapter",
    trains=("A", "B", "E"),
    scale=initial_rank,
    rules=("lrcompile.optim.adalora:Allocation",),
    aux="lrcompile.recipes.losses.orthogonality:orthogonality",
    options={
        "target_rank": integer(REQUIRED, 1),
        "total_steps": integer(REQUIRED, 1),
        "tinit": integer(0, 0),
        "tfinal": integer(0, 0),
        "delta_t": integer(1, 1),
        "beta1": number(0.85, "a number in (0, 1)", lambda v: 0 < v < 1),
        "beta2": number(0.85, "a number in (0, 1)", lambda v: 0 < v < 1),
        "orth_weight": number(0.1, "a number of at least 0", lambda v: v >= 0),
    },
    check=budgets,
    lacks={"scaling": "s is alpha over the initial rank", "init": "its factors are small Gaussians, E is 0"},
    peft="ADALORA",
)
