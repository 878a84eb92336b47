"""A function of several processes: each runs it in one group, and leaves nothing of it behind before the group ends."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

WORLD = 2


def in_group(rank: int, store: str, body: Callable[..., None], *args: Any) -> None:
    """body(rank, *args) as one of WORLD processes that meet at the file `store`.

    What `body` holds is freed before the group is. A model wrapped for data parallel that outlives its group deadlocks
    now and then: the last reference joins the group's threads while it holds the lock of the interpreter.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    try:
        body(rank, *args)
    finally:
        gc.collect()
        dist.destroy_process_group()


def spawn(store: object, body: Callable[..., None], *args: Any) -> None:
    """Run body(rank, *args) in WORLD new processes, each of which must be able to import it."""
    torch.multiprocessing.spawn(in_group, (str(store), body, *args), nprocs=WORLD)
