"""LoRA+ (arXiv 2402.12354): LoRA whose B learns `lr_ratio` times as fast as A."""

from lrcompile.recipes.recipe import Recipe, number

RECIPE = Recipe(
    name="lora+",
    summary="LoRA; B, and what is 1-D, at lr_ratio times the learning rate",
    paper="2402.12354",
    rules=("lrcompile.optim.lora_plus:Ratio",),
    options={
        "lr_ratio": number(16.0, "a number of at least 1", lambda v: v >= 1),
        "embedding_lr": number(1e-6, "a number above 0", lambda v: v > 0),
    },
    peft="LORA",
)
