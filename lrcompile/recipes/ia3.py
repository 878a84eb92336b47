"""(IA)³ (arXiv 2205.05638): one gain for each output, or for each input of the layers named in `feedforward`."""

from lrcompile.recipes.recipe import Option, Recipe
from lrcompile.recipes.scales import one


def _are_names(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(each, str) and each for each in value)


RECIPE = Recipe(
    name="ia3",
    summary="y = l ⊙ (xWᵀ + b), or y = (x ⊙ l)Wᵀ + b in feedforward layers",
    paper="2205.05638",
    form="lrcompile.recipes.forms.ia3:GainAdapter",
    trains=("gain",),
    scale=one,
    options={"feedforward": Option((), _are_names, "a list of name suffixes")},
    defaults={"rank": 1},
    lacks=dict.fromkeys(
        ("rank", "rank_pattern", "alpha", "alpha_pattern", "scaling", "init", "dropout"), "it has one vector a site"
    ),
    any_rank=True,
    peft="IA3",
)
