"""LoRA-SB (arXiv 2411.19557): LoRA-XS whose frozen factors and core come from an estimate of the first update.

With G the mean gradient and η the learning rate of the first step, B·M·A starts as the best rank-r approximation of
−η·sign(G), AdamW's first step, with A and B orthonormal; only M trains. So the output at the start is one step ahead of
the base's. The scale is 1: the paper divides it out of M again, its code sets alpha = rank.
"""

from lrcompile.recipes.recipe import REQUIRED, Recipe, integer, number
from lrcompile.recipes.scales import one

_NO_SCALE = "M carries the scale"

RECIPE = Recipe(
    name="lora-sb",
    summary="y = xWᵀ + b + (xAᵀ)MᵀBᵀ, M [r, r]; BMA starts as the best rank-r part of −η·sign(G)",
    paper="2411.19557",
    form="lrcompile.recipes.forms.core:CoreAdapter",
    trains=("M",),
    init="lrcompile.recipes.initialisers.gradient:lora_sb",
    calibration="lrcompile.recipes.calibration.gradients:Gradients",
    scale=one,
    options={
        "first_lr": number(
            REQUIRED, "a number above 0, the learning rate of the optimizer's first step", lambda v: v > 0
        ),
        "batches": integer(8, 1),
    },
    lacks={
        "init": "the gradient decides how the factors start",
        "alpha": _NO_SCALE,
        "alpha_pattern": _NO_SCALE,
        "scaling": _NO_SCALE,
    },
    nf4="needs the gradient of the float weight; apply it to the float model",
)
