"""What a method costs: the time of a step beside the frozen model's, and bytes of state, activations and checkpoint."""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lrcompile
from lrcompile.benching.task import Batch, Task
from lrcompile.benching.trial import FROZEN, Trial, adapted, optimizer_of
from lrcompile.progress import shown


@dataclass(frozen=True)
class Cost:
    step_ratio: tuple[float, float, float]
    """Time of forward, backward and optimizer step over that of the frozen model: lower end, median, upper end of a
    95 % bootstrap interval."""
    optimizer_bytes: int
    saved_bytes: int
    """What autograd keeps for the backward pass beyond what it keeps for the frozen model."""
    checkpoint_bytes: int


def measure(task: Task, ranks: Mapping[str, int], rounds: int) -> dict[str, Cost]:
    """Every method in `ranks`, interleaved in one process in random order, `rounds` times."""
    batch = next(iter(task.batches(0, 1)))
    runs = {method: _Run(task, method, rank, batch) for method, rank in {FROZEN: 1, **ranks}.items()}
    for run in runs.values():
        run.step()
        run.step()
    order = random.Random(0)
    for _ in shown(range(rounds), "timing steps", rounds):
        for method in order.sample(list(runs), len(runs)):
            runs[method].times.append(runs[method].step())
    frozen = runs.pop(FROZEN)
    saved = frozen.saved()
    return {
        method: Cost(
            step_ratio=interval([a / b for a, b in zip(run.times, frozen.times, strict=True)]),
            optimizer_bytes=run.state_bytes(),
            saved_bytes=run.saved() - saved,
            checkpoint_bytes=run.checkpoint(),
        )
        for method, run in runs.items()
    }


class _Run:
    """One model in training, its input carrying a gradient as it would above another adapted layer."""

    def __init__(self, task: Task, method: str, rank: int, batch: Batch):
        torch.manual_seed(0)
        self.model = adapted(task, Trial(task.name, method, rank, 1e-4, 0, 1000, "test"))
        self.optimizer = (
            optimizer_of(self.model, method, 1e-4, task)
            if any(p.requires_grad for p in self.model.parameters())
            else None
        )
        self.batch = batch
        self.times: list[float] = []
        first = next(m for m in self.model.modules() if isinstance(m, nn.Linear | nn.Embedding))
        first.register_forward_hook(_with_gradient)
        self.model.train()

    def loss(self) -> Tensor:
        return self.model(**self.batch).loss

    def step(self) -> float:
        started = time.perf_counter()
        self.loss().backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return time.perf_counter() - started

    def saved(self) -> int:
        own = {t.untyped_storage().data_ptr() for t in [*self.model.parameters(), *self.model.buffers()]}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.loss()
        total = sum(kept.values())
        loss.backward()
        self.model.zero_grad()
        return total

    def state_bytes(self) -> int:
        assert self.optimizer is not None
        tensors = [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors)

    def checkpoint(self) -> int:
        with tempfile.TemporaryDirectory() as folder:
            lrcompile.save(self.model, Path(folder) / "adapter")
            return sum(file.stat().st_size for file in (Path(folder) / "adapter").rglob("*") if file.is_file())


def _with_gradient(module: nn.Module, given: Any, output: Tensor) -> Tensor:
    return output if output.requires_grad else output.requires_grad_(True)


def interval(values: list[float], rounds: int = 2000) -> tuple[float, float, float]:
    """Lower end, median, upper end of a 95 % bootstrap interval of the median."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(rounds))
    return medians[int(0.025 * rounds)], statistics.median(values), medians[int(0.975 * rounds)]
