"""`apply`, then `fully_shard`: one step of two processes equals the single process's step on the whole batch."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.testing import assert_close

import lrcompile

WORLD = 2


def _adapted() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 14), nn.Tanh(), nn.Linear(14, 6), nn.Tanh(), nn.Linear(6, 2))
    lrcompile.apply(model, lrcompile.spec("lora", rank=2, alpha=3, seed=0))
    generator = torch.Generator().manual_seed(1)
    for name, factor in model.named_parameters():
        if name.endswith(".B"):
            factor.data.copy_(torch.randn(factor.shape, generator=generator))
    return model


def _batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(8, 10, generator=generator), torch.randn(8, 2, generator=generator)


def _step(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    loss = nn.functional.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


def _worker(rank: int, port: int, result: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    try:
        model = _adapted()
        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer)
        fully_shard(model)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        x, y = (part.chunk(WORLD)[rank] for part in _batch())
        loss = _step(model, x, y)
        dist.all_reduce(loss)
        after = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
        if rank == 0:
            torch.save({"loss": loss / WORLD, "parameters": after}, result)
    finally:
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_one_sharded_step_of_two_processes_equals_the_step_of_one(tmp_path: Path):
    whole = _adapted()
    start = {name: p.detach().clone() for name, p in whole.named_parameters()}
    loss = _step(whole, *_batch())

    torch.multiprocessing.spawn(_worker, (_free_port(), str(tmp_path / "sharded.pt")), nprocs=WORLD)
    sharded = torch.load(tmp_path / "sharded.pt", weights_only=True)

    # two halves averaged instead of one mean over eight rows: a few roundings of float32
    close = {"rtol": 16 * torch.finfo(torch.float32).eps, "atol": 16 * torch.finfo(torch.float32).eps}
    assert_close(sharded["loss"], loss, **close)
    for name, p in whole.named_parameters():
        assert_close(sharded["parameters"][name], p.detach(), **close)
        assert torch.equal(p, start[name]) == ("lrcompile_adapters" not in name), name
