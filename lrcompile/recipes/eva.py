"""EVA (arXiv 2410.07170): LoRA whose A starts as the main directions of its input, ranks going where there are more."""

from lrcompile.recipes.recipe import Recipe, integer, number

RECIPE = Recipe(
    name="eva",
    summary="y = xWᵀ + b + s·(xAᵀ)Bᵀ, A the leading right singular vectors of x at the start, B = 0",
    paper="2410.07170",
    init="lrcompile.recipes.initialisers.activations:eva",
    calibration="lrcompile.recipes.calibration.directions:Directions",
    options={
        "rho": number(2.0, "a number of at least 1", lambda v: v >= 1),
        "tau": number(0.99, "a number in (0, 1]", lambda v: 0 < v <= 1),
        "batches": integer(8, 1),
    },
    lacks={"init": "the data decide how A starts"},
    peft="LORA",
)
