"""LoRA-Pro (arXiv 2407.18242): LoRA whose gradients are those whose step is nearest to a full one."""

from lrcompile.recipes.recipe import Recipe

RECIPE = Recipe(
    name="lora-pro",
    summary="LoRA; gradients of A and B adjusted so that the step of BA is the nearest to that of W",
    paper="2407.18242",
    rules=("lrcompile.optim.lora_pro:NearestStep",),
    peft="LORA",
)
