"""One run: a method, a learning rate and a seed on one task. Called in worker processes."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lrcompile
from lrcompile.benching.contenders import spec_of
from lrcompile.benching.task import Task
from lrcompile.benching.tasks import TASKS
from lrcompile.demo.sources import quiet
from lrcompile.recipes import recipe
from lrcompile.recipes.recipe import part

HEAD_LR = 1e-2
"""Of modules every method trains in full: one rate for all, so that the sweep is the method's own."""
FROZEN = "frozen"
"""The contender without an adapter: only the head trains."""


@dataclass(frozen=True)
class Trial:
    task: str
    method: str
    rank: int
    lr: float
    seed: int
    steps: int
    part: str
    """What the quality is measured on."""

    @property
    def key(self) -> str:
        return f"{self.task}/{self.method}/r{self.rank}/lr{self.lr:g}/seed{self.seed}/{self.steps}/{self.part}"


_TASKS: dict[tuple[str, Path], Task] = {}


def run(trial: Trial, folder: Path) -> dict[str, Any]:
    """The trial's fields, its quality, its losses; `quality` None where training diverged."""
    torch.set_num_threads(1)
    quiet()
    task = _TASKS.setdefault((trial.task, folder), TASKS[trial.task](folder))
    torch.manual_seed(trial.seed)
    started = time.perf_counter()
    model = adapted(task, trial)
    losses = _train(model, task, trial)
    model.eval()
    quality = task.quality(model, trial.part) if all(map(math.isfinite, losses)) else None
    quality = quality if quality is not None and math.isfinite(quality) else None
    return {**asdict(trial), "quality": quality, "losses": losses, "seconds": time.perf_counter() - started}


def _train(model: nn.Module, task: Task, trial: Trial) -> list[float]:
    """The losses, ending with the first that is not finite; none where nothing trains."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        return []
    optimizer = optimizer_of(model, trial.method, trial.lr, task)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, _linear(trial.steps))
    losses: list[float] = []
    model.train()
    for batch in task.batches(trial.seed, trial.steps):
        optimizer.zero_grad()
        loss = model(**batch).loss
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            break
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        rate.step()
    return losses


def adapted(task: Task, trial: Trial) -> nn.Module:
    """The task's base with the method applied; `frozen` leaves all but the head as it is."""
    model = task.model()
    if trial.method == FROZEN:
        model.requires_grad_(False)
        for name in task.head:
            model.get_submodule(name).requires_grad_(True)
        return model
    spec = spec_of(trial.method, rank=trial.rank, steps=trial.steps, lr=trial.lr, seed=trial.seed, head=task.head)
    if recipe(trial.method).calibration is None:
        return lrcompile.apply(model, spec)
    return lrcompile.apply(model, spec, data=list(islice(task.batches(trial.seed + 1000, 8), 8)))


def optimizer_of(model: nn.Module, method: str, lr: float, task: Task) -> torch.optim.Optimizer:
    """AdamW without weight decay (LoRA-RITE brings its own), the head at its own rate."""
    if method == FROZEN:
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=HEAD_LR, weight_decay=0.0)
    brought = recipe(method).optimizer
    cls: Any = torch.optim.AdamW if brought is None else part(brought)
    optimizer = lrcompile.optimizer(model, cls, lr=lr, weight_decay=0.0)
    head = {id(p) for name in task.head for p in model.get_submodule(name).parameters()}
    for group in list(optimizer.param_groups):
        own = [p for p in group["params"] if id(p) in head]
        if own:
            group["params"] = [p for p in group["params"] if id(p) not in head]
            rest = {key: value for key, value in group.items() if key != "params"}
            optimizer.add_param_group({**rest, "params": own, "lr": HEAD_LR})
    return optimizer


def _linear(steps: int) -> Any:
    """Warm-up over the first tenth, then down to 0."""
    warmup = max(1, steps // 10)
    return lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
