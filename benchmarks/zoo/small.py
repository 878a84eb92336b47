"""Llama, GPT-2 and BERT with their heads, as small as they come, and batches padded on the right."""

from __future__ import annotations

from typing import Any

import torch
import transformers

TOKENS: dict[str, Any] = {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2}


def sizes(layers: int) -> dict[str, Any]:
    return {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 48}


def small(family: str, layers: int) -> Any:
    """The same weights every time."""
    config: Any
    torch.manual_seed(0)
    if family == "bert":
        more: dict[str, Any] = {"max_position_embeddings": 40, "num_labels": 5}
        config = transformers.BertConfig(**TOKENS, **sizes(layers), **more)
        return transformers.BertForSequenceClassification(config)
    if family == "llama":
        config = transformers.LlamaConfig(**TOKENS, **sizes(layers), num_key_value_heads=2)
        return transformers.LlamaForCausalLM(config)
    config = transformers.GPT2Config(**TOKENS, n_embd=32, n_layer=layers, n_head=4, n_positions=40)
    return transformers.GPT2LMHeadModel(config)


def padded(rows: int, length: int) -> dict[str, torch.Tensor]:
    """The last row ends in padding."""
    generator = torch.Generator().manual_seed(rows * length)
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[-1, length - length // 3 :] = 0
    return {"input_ids": torch.randint(3, 99, (rows, length), generator=generator), "attention_mask": mask}
