"""LoRA-XS (arXiv 2405.17604): frozen factors from the SVD of W around one small matrix that trains."""

from lrcompile.recipes.recipe import Recipe

RECIPE = Recipe(
    name="lora-xs",
    summary="y = xWᵀ + b + s·(xAᵀ)MᵀBᵀ, M [r, r]; A and B from the largest r triplets of W",
    paper="2405.17604",
    form="lrcompile.recipes.forms.core:CoreAdapter",
    trains=("M",),
    init="lrcompile.recipes.initialisers.svd:lora_xs",
    lacks={"init": "the weight decides how the factors start"},
)
