"""PiSSA (arXiv 2404.02948): LoRA that starts from the principal singular triplets of W."""

from lrcompile.recipes.recipe import Recipe, choice, integer_or_none

RECIPE = Recipe(
    name="pissa",
    summary="y = x(W − sB₀A₀)ᵀ + b + s·(xAᵀ)Bᵀ, sB₀A₀ the largest r triplets of W",
    paper="2404.02948",
    form="lrcompile.recipes.forms.offset:OffsetAdapter",
    init="lrcompile.recipes.initialisers.svd:pissa",
    options={
        "niter": integer_or_none(16, 0, "an exact SVD"),
        "residual": choice("keep", "keep", "fold"),
    },
    lacks={
        "init": "the weight decides how the factors start",
        "dropout": "the factors hold a part of the weight, which would be dropped",
    },
    nf4="splits the float weight; apply qpissa to the float model instead",
)
