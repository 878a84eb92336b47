"""CorDA (arXiv 2406.05223): LoRA that starts from the triplets of W that matter most, or least, to the data."""

from lrcompile.recipes.recipe import Recipe, choice, integer

RECIPE = Recipe(
    name="corda",
    summary="y = x(W − sB₀A₀)ᵀ + b + s·(xAᵀ)Bᵀ, sB₀A₀ from the SVD of WC, C the covariance of x",
    paper="2406.05223",
    form="lrcompile.recipes.forms.offset:OffsetAdapter",
    init="lrcompile.recipes.initialisers.covariance:corda",
    calibration="lrcompile.recipes.calibration.covariance:Covariance",
    options={
        "mode": choice("ipm", "ipm", "kpm"),
        "batches": integer(8, 1),
        "residual": choice("keep", "keep", "fold"),
    },
    lacks={
        "init": "weight and data decide how the factors start",
        "dropout": "the factors hold a part of the weight, which would be dropped",
    },
    nf4="splits the float weight; apply it to the float model",
)
