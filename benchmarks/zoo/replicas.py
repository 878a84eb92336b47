"""Several steps of a scheduled method on replicas with generators of their own; a spawned process must be able to
import it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import lrcompile

WORLD = 2
STEPS = 5
SPECS: dict[str, dict[str, Any]] = {
    "plora": {"period": 2, "momentum": 1.0},
    "delta-lora": {"start_step": 1, "ratio": 0.7},
}


def worker(rank: int, store: str, method: str, result: str) -> None:
    """Train on this rank's own data and write every tensor of the model to `result` followed by the rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    try:
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
    finally:
        dist.destroy_process_group()
