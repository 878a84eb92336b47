"""BitFit (arXiv 2106.10199): the biases train, and nothing else."""

from typing import Any

from lrcompile.errors import SpecError
from lrcompile.recipes.recipe import Recipe


def _trains_some(spec: Any) -> None:
    if spec.bias == "none":
        raise SpecError(
            "bitfit with bias='none' would train nothing: give 'all', or 'lora_only' for those of the targeted layers",
            field="bias",
        )


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
    check=_trains_some,
)
