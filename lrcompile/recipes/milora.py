"""MiLoRA (arXiv 2406.09044): LoRA that starts from the minor singular triplets of W, leaving the principal ones be."""

from lrcompile.recipes.recipe import Recipe, choice

RECIPE = Recipe(
    name="milora",
    summary="y = x(W − sB₀A₀)ᵀ + b + s·(xAᵀ)Bᵀ, sB₀A₀ the smallest r triplets of W",
    paper="2406.09044",
    form="lrcompile.recipes.forms.offset:OffsetAdapter",
    init="lrcompile.recipes.initialisers.svd:milora",
    options={
        "residual": choice("keep", "keep", "fold"),
    },
    lacks={
        "init": "the weight decides how the factors start",
        "dropout": "the factors hold a part of the weight, which would be dropped",
    },
    nf4="splits the float weight; apply qpissa to the float model instead",
)
