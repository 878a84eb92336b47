"""PeriodicLoRA (arXiv 2402.16141): every `period` steps the factors are unloaded into W and the run starts again.

A stage is `period` steps, and the learning rates given to the first are those of every stage: a scheduler is to be made
for `period` steps, warm-up included, not for the whole training. `momentum` is the share m that is unloaded; 1 unloads
everything and draws new factors. Training writes the base: see `lrcompile.remove`.
"""

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
