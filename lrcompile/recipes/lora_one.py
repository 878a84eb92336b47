"""LoRA-One (arXiv 2502.01235): LoRA that starts one full gradient step ahead of the base.

So its output at the start is not the base's. The paper trains it with preconditioned gradients; any optimizer works.
"""

from lrcompile.recipes.recipe import Recipe, integer, number

RECIPE = Recipe(
    name="lora-one",
    summary="y = xWᵀ + b + s·(xAᵀ)Bᵀ, BA along the best rank-r approximation of −G at the start",
    paper="2502.01235",
    init="lrcompile.recipes.initialisers.gradient:lora_one",
    calibration="lrcompile.recipes.calibration.gradients:Gradients",
    defaults={"scaling": "alpha/sqrt(r)"},
    options={"gamma": number(128.0, "a number above 0", lambda v: v > 0), "batches": integer(8, 1)},
    lacks={"init": "the gradient decides how the factors start"},
    nf4="needs the gradient of the float weight; apply it to the float model",
    peft="LORA",
)
