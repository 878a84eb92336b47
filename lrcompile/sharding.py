"""Tensors that fully_shard has spread over processes: as a whole, and back."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which each process has a part, differentiable; any other as it is."""
    sharded: Any = tensor
    return sharded.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def like(pattern: Tensor, tensor: Tensor) -> Tensor:
    """`tensor`, which is the same in every process, spread as `pattern` is."""
    if not hasattr(pattern, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    sharded: Any = pattern
    mesh = sharded.device_mesh
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False).redistribute(
        placements=sharded.placements
    )
