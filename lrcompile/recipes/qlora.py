"""QLoRA (arXiv 2305.14314): LoRA beside a base held as 4-bit NF4 codes."""

from lrcompile.recipes.recipe import BLOCK_SIZES, COMPUTE_DTYPES, Recipe, choice

RECIPE = Recipe(
    name="qlora",
    summary="y = x·dq(W₄)ᵀ + b + s·(xAᵀ)Bᵀ",
    paper="2305.14314",
    options={
        "block_size": choice(64, *BLOCK_SIZES),
        "double_quant": choice(True, True, False),
        "compute_dtype": choice("bfloat16", *COMPUTE_DTYPES),
        "keep_base": choice(None, None, "cpu"),
    },
    quantizes_base=True,
    peft="LORA",
)
