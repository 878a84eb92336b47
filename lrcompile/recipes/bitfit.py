"""BitFit (arXiv 2106.10199): the biases train, and nothing else."""

from lrcompile.recipes.recipe import Recipe

RECIPE = Recipe(
    name="bitfit",
    summary="y = xWᵀ + b, b trains",
    paper="2106.10199",
    form=None,
    trains=(),
    defaults={"bias": "all"},
    lacks=dict.fromkeys(
        ("rank", "rank_pattern", "alpha", "alpha_pattern", "scaling", "init", "dropout"), "it adds no tensors"
    ),
)
