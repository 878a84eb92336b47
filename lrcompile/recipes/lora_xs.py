"""LoRA-XS (arXiv 2405.17604): frozen factors from the SVD of W around one small matrix that trains."""

from lrcompile.recipes.recipe import Recipe, integer_or_none

RECIPE = Recipe(
    name="lora-xs",
    summary="y = xWᵀ + b + s·(xAᵀ)MᵀBᵀ, M [r, r]; A = S·Vᵀ and B = U of the largest r triplets of W",
    paper="2405.17604",
    form="lrcompile.recipes.forms.core:CoreAdapter",
    trains=("M",),
    init="lrcompile.recipes.initialisers.svd:lora_xs",
    options={
        "niter": integer_or_none(None, 0, "an exact SVD"),
    },
    lacks={"init": "the weight decides how the factors start"},
)
