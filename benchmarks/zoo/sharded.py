"""One step of an adapted model in several processes: it lives here, for a spawned process must be able to import it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import lrcompile
from zoo.processes import WORLD


def adapted() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 14), nn.Tanh(), nn.Linear(14, 6), nn.Tanh(), nn.Linear(6, 5))
    lrcompile.apply(model, lrcompile.spec("lora", rank=3, alpha=5, seed=0))
    generator = torch.Generator().manual_seed(1)
    for name, factor in model.named_parameters():
        if name.endswith(".B"):
            factor.data.copy_(torch.randn(factor.shape, generator=generator))
    return model


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(8, 10, generator=generator), torch.randn(8, 5, generator=generator)


def step(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    loss = nn.functional.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


def worker(rank: int, result: str) -> None:
    model = adapted()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    sharded = {name: p for name, p in model.named_parameters() if isinstance(p, DTensor)}
    assert len(sharded) == len(list(model.parameters()))
    x, y = (part.chunk(WORLD)[rank] for part in batch())
    loss = step(model, x, y)
    dist.all_reduce(loss)
    after = {name: p.full_tensor().detach() for name, p in sharded.items()}
    if rank == 0:
        torch.save({"loss": loss / WORLD, "parameters": after}, result)
