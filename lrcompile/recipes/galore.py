"""GaLore (arXiv 2403.03507): W trains whole, its optimizer sees the gradient's projection only."""

from lrcompile.recipes.recipe import Recipe, integer, number
from lrcompile.recipes.scales import one

RECIPE = Recipe(
    name="galore",
    summary="W ← W − lr·scale·P·N, N the optimizer's step on PᵀG; P anew every update_proj_gap steps",
    paper="2403.03507",
    form="lrcompile.recipes.forms.galore:ProjectedGradient",
    trains=("Z",),
    rules=("lrcompile.optim.galore:Lift",),
    scale=one,
    options={
        "update_proj_gap": integer(200, 1),
        "scale": number(0.25, "a number above 0", lambda v: v > 0),
    },
    lacks={
        "alpha": "its update is scaled by `scale`",
        "alpha_pattern": "its update is scaled by `scale`",
        "scaling": "its update is scaled by `scale`",
        "init": "its projection comes from the gradient",
        "dropout": "there is no adapter path to drop from",
    },
    nf4="trains the weight itself, which codes cannot follow; use q-galore on a float base",
    writes_base=True,
    merges="is the weight",
)
