"""HiRA (OpenReview TwJrTz9cRS): a low-rank product times W element by element, an update of full rank."""

from lrcompile.recipes.recipe import Recipe

RECIPE = Recipe(
    name="hira",
    summary="y = xWᵀ + b + s·x(W ⊙ BA)ᵀ",
    paper="OpenReview TwJrTz9cRS",
    form="lrcompile.recipes.forms.hira:HadamardAdapter",
)
