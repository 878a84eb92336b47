"""QLoRA (arXiv 2305.14314): LoRA beside a base held as 4-bit NF4 codes."""

from lrcompile.recipes.recipe import Option, Recipe

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
COMPUTE_DTYPES = ("bfloat16", "float16", "float32", "float64")

RECIPE = Recipe(
    name="qlora",
    summary="y = x·dq(W₄)ᵀ + b + s·(xAᵀ)Bᵀ",
    trains="A, B",
    paper="2305.14314",
    form="lrcompile.adapters:LoraAdapter",
    options={
        "block_size": Option(64, lambda v: isinstance(v, int) and v in BLOCK_SIZES, f"one of {BLOCK_SIZES}"),
        "double_quant": Option(True, lambda v: isinstance(v, bool), "true or false"),
        "compute_dtype": Option("bfloat16", lambda v: v in COMPUTE_DTYPES, f"one of {COMPUTE_DTYPES}"),
        "keep_base": Option(None, lambda v: v in (None, "cpu"), "None, or 'cpu' to make quantizing reversible"),
    },
    quantizes_base=True,
    peft="LORA",
)
