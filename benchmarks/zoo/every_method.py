"""What the tests over all methods share: a small model with a loss, a minimal spec of each method, a few steps."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

import lrcompile
from lrcompile.recipes import recipe

IN, WIDE, OUT, RANK = 12, 20, 5, 3

OPTIONS: dict[str, dict[str, Any]] = {
    "adalora": {"target_rank": 2, "total_steps": 10, "tfinal": 3},
    "bitfit": {},
    "delta-lora": {"start_step": 1, "ratio": 0.5},
    "galore": {"update_proj_gap": 2},
    "ia3": {"feedforward": ["down"]},
    "lora-drop": {"warmup_steps": 2, "threshold": 0.5},
    "plora": {"period": 2, "momentum": 0.5},
    "q-galore": {"update_proj_gap": 2},
    "eva": {"batches": 2},
    "corda": {"batches": 2},
    "lora-ga": {"batches": 2},
    "lora-one": {"batches": 2},
    "lora-sb": {"batches": 2, "first_lr": 0.02},
}
"""Fields beside rank and targets; {} where a method is not named."""

METHODS = list(lrcompile.methods())


class Tiny(nn.Module):
    """Two blocks with layers of one type and unequal widths, and a head."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(IN, WIDE, dtype=dtype), "down": nn.Linear(WIDE, IN, dtype=dtype)})
            for _ in range(2)
        )
        self.head = nn.Linear(IN, OUT, dtype=dtype)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        for block in self.blocks:
            x = x + block["down"](torch.tanh(block["up"](x)))  # type: ignore[index]
        logits = self.head(x)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def base(dtype: torch.dtype = torch.float32) -> Tiny:
    torch.manual_seed(7)
    return Tiny(dtype)


def batches(count: int, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        {
            "x": torch.randn(8, IN, generator=generator, dtype=torch.float64).to(dtype),
            "labels": torch.randint(OUT, (8,), generator=generator),
        }
        for _ in range(count)
    ]


def spec_of(method: str, **fields: Any) -> lrcompile.Spec:
    lacks = recipe(method).lacks
    common = {"rank": RANK, "alpha": 4.0, "targets": ["up", "down"], "seed": 5}
    given = {key: value for key, value in common.items() if key not in lacks}
    return lrcompile.spec(method, **{**given, **OPTIONS.get(method, {}), **fields})


def applied(method: str, model: Any = None, **fields: Any) -> Any:
    model = base() if model is None else model
    dtype = next(model.parameters()).dtype
    data = batches(2, dtype) if recipe(method).calibration else None
    return lrcompile.apply(model, spec_of(method, **fields), data=data)


def optimizer_of(method: str, model: nn.Module, lr: float = 0.02) -> torch.optim.Optimizer:
    cls: Any = lrcompile.LoraRite if method == "lora-rite" else torch.optim.AdamW
    return lrcompile.optimizer(model, cls, lr=lr)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: list[dict[str, Tensor]]) -> list[float]:
    model.train()
    losses = []
    for batch in data:
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def trained(method: str, steps: int = 4, model: Any = None, **fields: Any) -> Any:
    """The model after a few steps, in evaluation mode."""
    model = applied(method, model, **fields)
    train(model, optimizer_of(method, model), batches(steps, next(model.parameters()).dtype))
    return model.eval()
