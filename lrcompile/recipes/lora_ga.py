"""LoRA-GA (arXiv 2407.05000): LoRA whose first step goes where a full fine-tuning step would."""

from lrcompile.recipes.recipe import Recipe, choice, integer, number

RECIPE = Recipe(
    name="lora-ga",
    summary="y = x(W − sB₀A₀)ᵀ + b + s·(xAᵀ)Bᵀ, A₀ and B₀ from the singular vectors of the mean gradient",
    paper="2407.05000",
    form="lrcompile.recipes.forms.offset:OffsetAdapter",
    init="lrcompile.recipes.initialisers.gradient:lora_ga",
    calibration="lrcompile.recipes.calibration.gradients:Gradients",
    options={
        "gamma": number(16.0, "a number above 0", lambda v: v > 0),
        "direction": choice("ArB2r", "ArB2r", "A2rBr", "ArBr"),
        "batches": integer(8, 1),
        "residual": choice("keep", "keep", "fold"),
    },
    defaults={"scaling": "alpha/sqrt(r)"},
    lacks={
        "init": "the gradient decides how the factors start",
        "dropout": "the factors hold a part of the weight, which would be dropped",
    },
    nf4="needs the gradient of the float weight; apply it to the float model",
)
