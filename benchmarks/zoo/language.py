"""A tiny Llama that has learned something: characters of Python's source, then, through an adapter, of its manual."""

from __future__ import annotations

import ast
import inspect
import pydoc_data.topics
from collections.abc import Iterator
from typing import Any

import torch
import transformers

import lrcompile

LENGTH = 48
BATCH = 8


def tokens(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode("ascii", "ignore")))


def source() -> torch.Tensor:
    return tokens(inspect.getsource(ast) + inspect.getsource(inspect))


def manual() -> torch.Tensor:
    return tokens("".join(pydoc_data.topics.topics.values())[:300_000])


def batches(text: torch.Tensor, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(0, len(text) - LENGTH, (BATCH,), generator=generator)
        ids = torch.stack([text[start : start + LENGTH] for start in starts])
        yield {"input_ids": ids, "labels": ids}


def base(hidden: int = 64, steps: int = 150, intermediate: int | None = None) -> Any:
    """A Llama of two layers, trained on Python's source."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=128, hidden_size=hidden, intermediate_size=intermediate or 2 * hidden, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, use_cache=False,
        )
    )  # fmt: skip
    train(model, torch.optim.AdamW(model.parameters(), lr=2e-3), source(), steps)
    return model


def adapted(model: Any, steps: int = 30, lr: float = 1e-3, **fields: Any) -> Any:
    """`model` with an adapter trained on Python's manual: how large it is goes with `steps` and `lr`."""
    torch.manual_seed(1)
    lrcompile.apply(model, lrcompile.spec("lora", **{"rank": 4, "alpha": 8} | fields))
    train(model, lrcompile.optimizer(model, torch.optim.AdamW, lr=lr), manual(), steps)
    return model.eval()


def train(model: Any, optimizer: torch.optim.Optimizer, text: torch.Tensor, steps: int) -> None:
    model.train()
    for batch, _ in zip(batches(text, 0), range(steps), strict=False):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def sample(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Batches of the manual, others for each seed."""
    return [{"input_ids": batch["input_ids"]} for batch, _ in zip(batches(manual(), seed), range(count), strict=False)]
