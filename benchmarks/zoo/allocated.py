"""AdaLoRA in several processes, wrapped or sharded: a spawned process must be able to import this."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import lrcompile
from lrcompile.sharding import whole
from zoo.processes import WORLD

STEPS = 7


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(10, 14), nn.Linear(14, 6)
        self.double()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.down(torch.tanh(self.up(x))) - labels).square().mean()}


def adapted() -> nn.Module:
    spec = lrcompile.spec("adalora", rank=4, target_rank=2, total_steps=6, tinit=1, tfinal=2, seed=0, orth_weight=0.3)
    return lrcompile.apply(Model(), spec).train()


def train(model: nn.Module, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    """Adapter tensors after training on this process's part of every batch, by name without wrapper."""
    optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(8, 10, generator=generator, dtype=torch.float64)
        labels = torch.randn(8, 6, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        model(x=x.chunk(world)[rank], labels=labels.chunk(world)[rank])["loss"].backward()
        optimizer.step()
    named = {name.removeprefix("module."): p for name, p in model.named_parameters() if p.requires_grad}
    return {name: whole(p).detach().clone() for name, p in named.items()}


def worker(rank: int, kind: str, result: str) -> None:
    model = adapted()
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        for layer in [each for each in model.modules() if isinstance(each, nn.Linear)]:
            fully_shard(layer)
        fully_shard(model)
    trained = train(model, rank, WORLD)
    if rank == 0:
        torch.save(trained, result)
