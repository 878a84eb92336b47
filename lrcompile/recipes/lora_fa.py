"""LoRA-FA (arXiv 2308.03303): LoRA whose A stays frozen, so that xAᵀ is all it saves for the backward pass."""

from lrcompile.recipes.recipe import Recipe, choice

RECIPE = Recipe(
    name="lora-fa",
    summary="y = xWᵀ + b + s·(xAᵀ)Bᵀ, A frozen",
    paper="2308.03303",
    trains=("B",),
    init="lrcompile.recipes.initialisers.frozen:draw_rows",
    rules=("lrcompile.optim.lora_fa:Correction",),
    options={"correction": choice(True, True, False)},
    peft="LORA",
)
