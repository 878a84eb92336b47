"""PiSSA (arXiv 2404.02948): LoRA that starts from the principal singular triplets of W."""

from lrcompile.recipes.recipe import Option, Recipe, choice

RECIPE = Recipe(
    name="pissa",
    summary="y = x(W − sB₀A₀)ᵀ + b + s·(xAᵀ)Bᵀ, sB₀A₀ the largest r triplets of W",
    paper="2404.02948",
    form="lrcompile.recipes.forms.offset:OffsetAdapter",
    init="lrcompile.recipes.initialisers.svd:pissa",
    options={
        "niter": Option(
            16,
            lambda v: v is None or (isinstance(v, int) and not isinstance(v, bool) and v >= 0),
            "an integer of at least 0, or None for an exact SVD",
        ),
        "residual": choice("keep", "keep", "fold"),
    },
    lacks={
        "init": "the weight decides how the factors start",
        "dropout": "the factors hold a part of the weight, which would be dropped",
    },
    nf4="splits the float weight; apply qpissa to the float model instead",
)
