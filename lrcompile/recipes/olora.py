"""OLoRA (arXiv 2406.01775): LoRA that starts from the QR decomposition of W."""

from lrcompile.recipes.recipe import Recipe, choice

RECIPE = Recipe(
    name="olora",
    summary="y = x(W − sB₀A₀)ᵀ + b + s·(xAᵀ)Bᵀ, W = QR, B₀ the first r columns of Q, A₀ the first r rows of R",
    paper="2406.01775",
    form="lrcompile.recipes.forms.offset:OffsetAdapter",
    init="lrcompile.recipes.initialisers.qr:olora",
    options={
        "residual": choice("keep", "keep", "fold"),
    },
    lacks={
        "init": "the weight decides how the factors start",
        "dropout": "the factors hold a part of the weight, which would be dropped",
    },
    nf4="splits the float weight; apply qpissa to the float model instead",
)
