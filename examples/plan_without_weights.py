"""What would an adapter on a 405-billion-parameter model cost? Planned from its config alone, on a laptop.

python examples/plan_without_weights.py      (needs: pip install 'lrcompile[hf]'; seconds)
"""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import lrcompile
from lrcompile.planning import plan

config = LlamaConfig(
    hidden_size=16384,
    intermediate_size=53248,
    num_hidden_layers=126,
    num_attention_heads=128,
    num_key_value_heads=8,
    vocab_size=128256,
    dtype="bfloat16",
)
with torch.device("meta"):  # no memory, no download
    model = AutoModelForCausalLM.from_config(config)

for method in ("lora", "qlora"):
    found = plan(model, lrcompile.spec(method, rank=16, targets="all-linear"), tokens=8192)
    print(f"{method}: {len(found.sites)} sites looked at, trains {found.trainable:,} of {found.total:,} numbers")
    print(f"  weights {found.base_bytes / 2**30:,.0f} GiB, training state {found.trainer_bytes / 2**30:,.1f} GiB")
    adapters = found.adapter_flops / (found.frozen_flops + found.adapter_flops)
    print(f"  a step of {found.tokens:,} tokens: {found.frozen_flops / 1e15:,.1f} PFLOP, adapters add {adapters:.2%}")
