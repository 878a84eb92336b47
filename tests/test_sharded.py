"""`apply`, then `fully_shard`: one step of two processes equals the single process's step on the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from zoo import allocated
from zoo.processes import spawn
from zoo.sharded import adapted, batch, step, worker


@pytest.mark.slow
def test_one_sharded_step_of_two_processes_equals_the_step_of_one(tmp_path: Path):
    whole = adapted()
    start = {name: p.detach().clone() for name, p in whole.named_parameters()}
    loss = step(whole, *batch())

    spawn(tmp_path / "store", worker, str(tmp_path / "sharded.pt"))
    sharded = torch.load(tmp_path / "sharded.pt", weights_only=True)

    # two halves averaged instead of one mean over eight rows: a few roundings of float32
    limit = 16 * torch.finfo(torch.float32).eps
    assert_close(sharded["loss"], loss, rtol=limit, atol=limit)
    for name, p in whole.named_parameters():
        assert_close(sharded["parameters"][name], p.detach(), rtol=limit, atol=limit)
        assert torch.equal(p, start[name]) == ("lrcompile_adapters" not in name), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_adalora_allocates_in_two_processes_as_in_one(kind: str, tmp_path: Path):
    whole = allocated.train(allocated.adapted())
    spawn(tmp_path / "store", allocated.worker, kind, str(tmp_path / "trained.pt"))
    shared = torch.load(tmp_path / "trained.pt", weights_only=True)
    assert shared.keys() == whole.keys()
    for name, value in whole.items():
        assert_close(shared[name], value, rtol=1e-8, atol=1e-10)
    assert sum(int(value.count_nonzero()) for name, value in shared.items() if name.endswith(".E")) == 4
