"""QPiSSA (arXiv 2404.02948): PiSSA whose residual is held in NF4, factors and codes found by alternation."""

from lrcompile.recipes.recipe import BLOCK_SIZES, COMPUTE_DTYPES, Recipe, choice, integer, integer_or_none

RECIPE = Recipe(
    name="qpissa",
    summary="y = x·dq(Q)ᵀ + b + s·(xAᵀ)Bᵀ, Q = nf4(W − sBA) and sBA = SVDᵣ(W − dq(Q)) in turn, from SVDᵣ(W)",
    paper="2404.02948",
    init="lrcompile.recipes.initialisers.alternating:qpissa",
    options={
        "iterations": integer(5, 1),
        "niter": integer_or_none(16, 0, "an exact SVD"),
        "block_size": choice(64, *BLOCK_SIZES),
        "double_quant": choice(True, True, False),
        "compute_dtype": choice("bfloat16", *COMPUTE_DTYPES),
        "keep_base": choice(None, None, "cpu"),
    },
    lacks={
        "init": "the weight decides how the factors start",
        "dropout": "the factors hold a part of the weight, which would be dropped",
    },
    quantizes_base=True,
    nf4="needs the float weight, of which codes keep a part only",
    peft="LORA",
)
