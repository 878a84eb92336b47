"""The training loop, and the baseline an adapter must beat: as many steps on the head alone, the encoder frozen.

Both minimise the mean cross-entropy of batches drawn in the same order, with gradients clipped to norm 1 and a learning
rate that rises over the first tenth of the steps and falls linearly to zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lrcompile.demo.model import TextClassifier, pad

Tick = Callable[[int, float], None]  # (step from 1, loss)
SORTED_TOGETHER = 8


@dataclass(frozen=True)
class Examples:
    """Token ids of each text, its label, and the id that pads."""

    rows: list[list[int]]
    labels: list[int]
    pad_id: int

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: list[int]) -> dict[str, Tensor]:
        return pad([self.rows[i] for i in indices], self.pad_id)

    def targets(self, indices: list[int]) -> Tensor:
        return torch.tensor([self.labels[i] for i in indices])

    def labelled(self, indices: list[int]) -> dict[str, Tensor]:
        return {**self.batch(indices), "labels": self.targets(indices)}

    def batches(self, size: int) -> Iterator[list[int]]:
        """All indices, `size` at a time, from short texts to long: a batch is as wide as its longest text."""
        order = sorted(range(len(self)), key=lambda i: len(self.rows[i]))
        for start in range(0, len(self), size):
            yield order[start : start + size]


def schedule(lengths: list[int], batch_size: int, epochs: float, seed: int) -> list[list[int]]:
    """The batches of a run, as indices: `epochs` passes (a fraction ends early), each reshuffled.

    Texts meet others of like length, which saves about half of the computation on padding: each `SORTED_TOGETHER`
    batches of a shuffled pass are sorted among themselves, and all come in random order.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = max(1, round(epochs * -(-len(lengths) // batch_size)))
    batches: list[list[int]] = []
    while len(batches) < steps:
        shuffled = torch.randperm(len(lengths), generator=generator).tolist()
        order: list[int] = []
        for start in range(0, len(shuffled), SORTED_TOGETHER * batch_size):
            order += sorted(shuffled[start : start + SORTED_TOGETHER * batch_size], key=lambda i: lengths[i])
        chunks = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        batches += [chunks[i] for i in torch.randperm(len(chunks), generator=generator).tolist()]
    return batches[:steps]


def fit(
    loss_of: Callable[[list[int]], Tensor], optimizer: torch.optim.Optimizer, batches: list[list[int]], tick: Tick
) -> list[float]:
    """Take one step a batch; return the losses. `loss_of(indices)` is the batch's loss with its graph."""
    warmup = max(1, len(batches) // 10)
    rate = LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (len(batches) - step) / max(1, len(batches) - warmup))
    )
    losses = []
    for step, indices in enumerate(batches, start=1):
        loss = loss_of(indices)
        loss.backward()
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        rate.step()
        losses.append(loss.item())
        tick(step, losses[-1])
    return losses


def give_own_rate(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], lr: float) -> None:
    """Move those of `parameters` that `optimizer` trains into a group of their own, with its own learning rate."""
    wanted = {id(parameter) for parameter in parameters}
    moved = []
    for group in optimizer.param_groups:
        moved += [parameter for parameter in group["params"] if id(parameter) in wanted]
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in wanted]
    if moved:
        optimizer.add_param_group({"params": moved, "lr": lr})


def fit_adapter(
    model: TextClassifier, optimizer: torch.optim.Optimizer, examples: Examples, batches: list[list[int]], tick: Tick
) -> list[float]:
    """Train whatever `optimizer` holds through the whole model; leaves it in eval mode."""

    def loss_of(indices: list[int]) -> Tensor:
        return model(**examples.labelled(indices)).loss

    model.train()
    losses = fit(loss_of, optimizer, batches, tick)
    model.eval()
    return losses


def encode_once(model: TextClassifier, examples: Examples, size: int, tick: Tick) -> Tensor:
    """The frozen encoder's output for every example, [examples, d], float32: no step of the baseline changes it."""
    features = torch.empty(len(examples), model.head.in_features)
    with torch.no_grad():
        for step, indices in enumerate(examples.batches(size), start=1):
            features[indices] = model.pooled(**examples.batch(indices))
            tick(step, math.nan)
    return features


def fit_head(
    model: TextClassifier, features: Tensor, examples: Examples, batches: list[list[int]], lr: float, tick: Tick
) -> list[float]:
    """Train the head alone on `features`, the encoder's outputs by example."""

    def loss_of(indices: list[int]) -> Tensor:
        return F.cross_entropy(model.head(features[indices]), examples.targets(indices))

    return fit(loss_of, torch.optim.AdamW(model.head.parameters(), lr=lr, weight_decay=0.0), batches, tick)
