"""Q-GaLore (arXiv 2407.08296): GaLore on an INT8 base with an INT4 projection that is renewed less and less often."""

from lrcompile.recipes.recipe import Option, Recipe, integer, number
from lrcompile.recipes.scales import one

RECIPE = Recipe(
    name="q-galore",
    summary="GaLore; W in INT8 written with stochastic rounding, P in INT4, renewed the less the steadier it is",
    paper="2407.08296",
    form="lrcompile.recipes.forms.q_galore:QuantizedProjectedGradient",
    trains=("Z",),
    rules=("lrcompile.optim.q_galore:LazyLift",),
    scale=one,
    options={
        "update_proj_gap": integer(200, 1),
        "scale": number(0.25, "a number above 0", lambda v: v > 0),
        "similarity": number(0.4, "a number in (0, 1]", lambda v: 0 < v <= 1),
        "group_size": Option(
            256,
            lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 2 and v % 2 == 0,
            "an even integer of at least 2",
        ),
    },
    lacks={
        "alpha": "its update is scaled by `scale`",
        "alpha_pattern": "its update is scaled by `scale`",
        "scaling": "its update is scaled by `scale`",
        "init": "its projection comes from the gradient",
        "dropout": "there is no adapter path to drop from",
    },
    nf4="holds the weight in INT8 itself; give it a float base",
    writes_base=True,
    merges="is the weight",
)
