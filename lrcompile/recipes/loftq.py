"""LoftQ (arXiv 2310.08659): LoRA that starts as the best correction of its own NF4 base."""

from lrcompile.recipes.recipe import BLOCK_SIZES, COMPUTE_DTYPES, Recipe, choice, integer, integer_or_none

RECIPE = Recipe(
    name="loftq",
    summary="y = x·dq(Q)ᵀ + b + s·(xAᵀ)Bᵀ, Q = nf4(W − sBA) and sBA = SVDᵣ(W − dq(Q)) in turn, from nf4(W)",
    paper="2310.08659",
    init="lrcompile.recipes.initialisers.alternating:loftq",
    options={
        "iterations": integer(5, 1),
        "niter": integer_or_none(16, 0, "an exact SVD"),
        "block_size": choice(64, *BLOCK_SIZES),
        "double_quant": choice(True, True, False),
        "compute_dtype": choice("bfloat16", *COMPUTE_DTYPES),
        "keep_base": choice(None, None, "cpu"),
    },
    lacks={"init": "the weight decides how the factors start"},
    quantizes_base=True,
    nf4="needs the float weight, of which codes keep a part only",
    peft="LORA",
)
