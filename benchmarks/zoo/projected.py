"""Small models under GaLore, and what two processes do with them; a spawned process must be able to import it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn

import lrcompile
from lrcompile.recipes.forms.galore import ProjectedGradient
from lrcompile.recipes.range_finder import leading_directions

SIZES = (7, 12, 5)  # right (out > in), then left (out < in)


def plain(dtype: torch.dtype = torch.float64, sizes: tuple[int, ...] = SIZES) -> Any:
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential()
    for inside, out in itertools.pairwise(sizes):
        model.extend([nn.Linear(inside, out), nn.Tanh()])
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / math.sqrt(p.shape[-1]))
    return model.to(dtype)


def galore(model: nn.Module, *, rank: int = 3, gap: int = 4, scale: float = 0.5, **fields: Any) -> Any:
    return lrcompile.apply(
        model, lrcompile.spec("galore", rank=rank, update_proj_gap=gap, scale=scale, seed=0, **fields)
    )


def adapter(model: Any, index: int) -> ProjectedGradient:
    return model[index].lrcompile_adapters["weight"]["default"]


def batches(count: int, size: int = 6, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(size, SIZES[0], generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def loss(model: Any, x: Tensor) -> Tensor:
    return model(x).square().sum()


def weights(model: Any) -> list[Tensor]:
    return [model[index].weight.detach().clone() for index in (0, 2)]


def train_replicas(rank: int, path: str) -> None:
    model = galore(plain(), gap=2)
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = lrcompile.optimizer(wrapped, torch.optim.AdamW, lr=0.01)
    for x in batches(5, size=8):
        optimizer.zero_grad()
        (2 * loss(wrapped, x[rank::2])).backward()  # a sum over the batch, where DDP takes the mean over processes
        optimizer.step()
    torch.save([*weights(model), *(adapter(model, index).P.detach() for index in (0, 2))], f"{path}/{rank}.pt")


def find_directions(rank: int, path: str) -> None:
    """This process's share of a product, of which the group finds the directions."""
    a, b = torch.load(f"{path}/data.pt")
    torch.save(leading_directions(a[rank::2], b[rank::2], 3, seed=0), f"{path}/{rank}.pt")
