"""Delta-LoRA (arXiv 2309.02411): W follows the steps of BA, `ratio` times as far; kept here as a pair beside W."""

from lrcompile.recipes.recipe import REQUIRED, Recipe, integer, number

RECIPE = Recipe(
    name="delta-lora",
    summary="y = xWₜᵀ + b + s·(xAᵀ)Bᵀ, Wₜ₊₁ = Wₜ + ratio·s·(Bₜ₊₁Aₜ₊₁ − BₜAₜ) after start_step",
    paper="2309.02411",
    form="lrcompile.recipes.forms.delta:DeltaAdapter",
    rules=("lrcompile.optim.delta_lora:Follow",),
    options={
        "start_step": integer(REQUIRED, 0),
        "ratio": number(REQUIRED, "a number above 0", lambda v: v > 0),
    },
    lacks={"dropout": "W and BA must see the same gradient"},
)
