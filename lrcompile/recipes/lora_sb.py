"""LoRA-SB (arXiv 2411.19557): LoRA-XS whose frozen factors and core come from an estimate of the first update."""

from lrcompile.recipes.recipe import Recipe, integer

RECIPE = Recipe(
    name="lora-sb",
    summary="y = xWᵀ + b + s·(xAᵀ)MᵀBᵀ, M [r, r]; A, B and M from the SVD of the mean gradient",
    paper="2411.19557",
    form="lrcompile.recipes.forms.core:CoreAdapter",
    trains=("M",),
    init="lrcompile.recipes.initialisers.gradient:lora_sb",
    calibration="lrcompile.recipes.calibration.gradients:Gradients",
    options={"batches": integer(8, 1)},
    lacks={"init": "the gradient decides how the factors start"},
    nf4="needs the gradient of the float weight; apply it to the float model",
)
