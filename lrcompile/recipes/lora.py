"""LoRA (arXiv 2106.09685), with the rank-stabilised scale of arXiv 2312.03732 as a choice of `scaling`."""

from lrcompile.recipes.recipe import Recipe

RECIPE = Recipe(
    name="lora",
    summary="y = xWᵀ + b + s·(xAᵀ)Bᵀ",
    paper="2106.09685",
    peft="LORA",
)
