"""Methods that act at certain steps, under DistributedDataParallel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from zoo.processes import WORLD, spawn
from zoo.replicas import SPECS, worker

import lrcompile


@pytest.mark.slow
@pytest.mark.parametrize("method", SPECS)
def test_replicas_stay_equal_to_the_bit_through_unloads_and_starts(method: str, tmp_path: Path):
    result = str(tmp_path / "rank")
    spawn(tmp_path / "store", worker, method, result)
    first, *others = (torch.load(f"{result}{rank}", weights_only=True) for rank in range(WORLD))
    for other in others:
        assert all(torch.equal(value, other[key]) for key, value in first.items())
    acted = [bool(value) for key, value in first.items() if key.endswith(("written", "following"))]
    assert acted
    assert all(acted)


def test_a_method_that_writes_the_weight_refuses_one_that_is_sharded(tmp_path: Path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(7, 5))
        fully_shard(lrcompile.apply(model, lrcompile.spec("plora", rank=2, **SPECS["plora"])))
        with pytest.raises(lrcompile.AdapterError, match="the weight of '0', which is sharded here"):
            lrcompile.optimizer(model, torch.optim.AdamW, lr=0.05)
    finally:
        dist.destroy_process_group()
