"""DoRA (arXiv 2402.09353): the size of each output row trains apart from its direction."""

from lrcompile.recipes.recipe import Recipe

RECIPE = Recipe(
    name="dora",
    summary="y = b + m/‖W + sBA‖ ⊙ (xWᵀ + s·(xAᵀ)Bᵀ)",
    paper="2402.09353",
    form="lrcompile.recipes.forms.dora:DoraAdapter",
    trains=("A", "B", "m"),
    peft="LORA",
)
