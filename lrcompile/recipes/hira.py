"""HiRA (OpenReview TwJrTz9cRS): a low-rank product times W element by element, an update of full rank."""

from lrcompile.recipes.recipe import Recipe
from lrcompile.recipes.scales import one

RECIPE = Recipe(
    name="hira",
    summary="y = xWᵀ + b + x(W ⊙ BA)ᵀ",
    paper="OpenReview TwJrTz9cRS",
    form="lrcompile.recipes.forms.hira:HadamardAdapter",
    scale=one,
    lacks=dict.fromkeys(("alpha", "alpha_pattern", "scaling"), "W is the scale of its update"),
    peft="HIRA",
)
