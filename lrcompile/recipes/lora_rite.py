"""LoRA-RITE (arXiv 2410.20625): LoRA with an optimizer to which every factorisation of BA is the same."""

from lrcompile.recipes.recipe import Recipe

RECIPE = Recipe(
    name="lora-rite",
    summary="LoRA; moments of the gradient in a basis of BA's own, whatever A and B share between them",
    paper="2410.20625",
    rules=("lrcompile.optim.lora_rite:RiteOnly",),
    optimizer="lrcompile.optim.lora_rite:LoraRite",
    peft="LORA",
)
