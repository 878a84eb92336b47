"""VeRA (arXiv 2310.11454): one frozen random pair for all sites, two small vectors for each."""

from lrcompile.recipes.recipe import Recipe, number
from lrcompile.recipes.scales import one

RECIPE = Recipe(
    name="vera",
    summary="y = xWᵀ + b + λ_b ⊙ ((λ_d ⊙ (xAᵀ))Bᵀ), A and B frozen and shared",
    paper="2310.11454",
    form="lrcompile.recipes.forms.vera:VeraAdapter",
    trains=("lambda_d", "lambda_b"),
    scale=one,
    options={"d_initial": number(0.1, "a number other than 0", lambda v: v != 0)},
    defaults={"seed": 0},
    lacks={
        "alpha": "its vectors carry the scale",
        "alpha_pattern": "its vectors carry the scale",
        "scaling": "its vectors carry the scale",
        "init": "the projections are drawn from `seed`, the vectors are constant",
        "rank_pattern": "one pair of projections serves all sites",
    },
    any_rank=True,
    peft="VERA",
)
