"""LoRA-drop (arXiv 2402.07721): after a warm-up, sites whose output matters little share one pair of factors.

How long the paper measures, and on how much data, is not verified, nor is its threshold: `warmup_steps` must be given,
and the second half of it is measured, where B has left its zero (so at least 2).
"""

from lrcompile.recipes.recipe import REQUIRED, Recipe, integer, number

RECIPE = Recipe(
    name="lora-drop",
    summary="LoRA; from warmup_steps on, sites outside the top threshold of output energy share one pair a type",
    paper="2402.07721",
    form="lrcompile.recipes.forms.lora_drop:MeasuredLora",
    rules=("lrcompile.optim.lora_drop:Selection",),
    options={
        "warmup_steps": integer(REQUIRED, 2),
        "threshold": number(0.9, "a number in (0, 1]", lambda v: 0 < v <= 1),
    },
    peft="LORA",
)
