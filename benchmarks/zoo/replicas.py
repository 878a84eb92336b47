"""Several steps of a scheduled method on replicas with generators of their own; a spawned process must be able to
import it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import lrcompile

STEPS = 5
SPECS: dict[str, dict[str, Any]] = {
    "plora": {"period": 2, "momentum": 1.0},
    "delta-lora": {"start_step": 1, "ratio": 0.7},
}


def worker(rank: int, method: str, result: str) -> None:
    """Train on this rank's own data and write every tensor of the model to `result` followed by the rank."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))
    torch.manual_seed(rank)
    lrcompile.apply(model, lrcompile.spec(method, rank=2, alpha=3, **SPECS[method]))
    torch.manual_seed(77 + rank)
    replica = nn.parallel.DistributedDataParallel(model)
    optimizer = lrcompile.optimizer(replica, torch.optim.AdamW, lr=0.05)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss: Tensor = replica(torch.randn(4, 7)).square().sum()
        loss.backward()
        optimizer.step()
    torch.save(model.state_dict(), f"{result}{rank}")
