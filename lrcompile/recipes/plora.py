"""PeriodicLoRA (arXiv 2402.16141): every `period` steps the factors are unloaded into W and the run starts again."""

from lrcompile.recipes.recipe import REQUIRED, Recipe, integer, number

RECIPE = Recipe(
    name="plora",
    summary="LoRA; every period steps W ← W + m·sBA, B ← (1 − m)·B, optimizer and schedule from the start",
    paper="2402.16141",
    rules=("lrcompile.optim.stages:Stages", "lrcompile.optim.plora:Unload"),
    options={
        "period": integer(REQUIRED, 1),
        "momentum": number(
            REQUIRED, "a number in (0, 1]: the share of the update that is unloaded", lambda v: 0 < v <= 1
        ),
    },
    nf4="writes its update into the weight, where NF4 would round it away",
    writes_base=True,
)
