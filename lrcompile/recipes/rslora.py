"""rsLoRA (arXiv 2312.03732): LoRA with s = α/√rank, the one exponent that keeps its size as the rank grows."""

from lrcompile.recipes.recipe import Recipe

RECIPE = Recipe(
    name="rslora",
    summary="y = xWᵀ + b + s·(xAᵀ)Bᵀ, s = α/√r",
    paper="2312.03732",
    defaults={"scaling": "alpha/sqrt(r)"},
    peft="LORA",
)
