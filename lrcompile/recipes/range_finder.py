"""The leading singular directions of a product, from products with its two factors only."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

OVERSAMPLING = 8
POWER_ITERATIONS = 2


def leading_directions(a: Tensor, b: Tensor, rank: int, *, seed: int) -> Tensor | None:
    """V_rᵀ `[rank, m]` with orthonormal rows, where aᵀb ≈ U_r·S_r·V_rᵀ is a truncated singular value decomposition.

    a `[..., n]` and b `[..., m]`, n ≥ m ≥ rank, share their leading dimensions. A randomised range finder (arXiv
    0909.4061) in float32 (float64 for float64 inputs): rank + 8 random directions, two power iterations, each product
    followed by a QR decomposition; the n × m matrix is never formed. Where aᵀb has fewer directions than `rank`, the
    others are arbitrary; rank = m gives a basis of everything. Under an initialised `torch.distributed` aᵀb is the sum
    over all ranks, each of which must call this, and gets the same answer. None if aᵀb is zero or not finite.
    """
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = a.reshape(-1, a.shape[-1]).to(wide), b.reshape(-1, b.shape[-1]).to(wide)
    width = min(rank + OVERSAMPLING, b.shape[-1])
    generator = torch.Generator(a.device).manual_seed(seed)
    sketch = torch.randn(a.shape[-1], width, generator=generator, dtype=wide, device=a.device)
    Q = _summed(b.t() @ (a @ sketch))  # [m, width]
    size = Q.abs().amax()
    if not (torch.isfinite(size) and size > 0):
        return None
    Q = torch.linalg.qr(Q / size).Q
    for _ in range(POWER_ITERATIONS):
        Q = torch.linalg.qr(_summed(a.t() @ (b @ Q))).Q
        Q = torch.linalg.qr(_summed(b.t() @ (a @ Q))).Q
    small = torch.linalg.qr(_summed(a.t() @ (b @ Q))).R  # (aᵀb)·Q = Q'·R, so R has its singular values
    directions = torch.linalg.svd(small, full_matrices=False).Vh[:rank] @ Q.t()
    return _same_everywhere(directions.contiguous())


def _parallel() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _summed(product: Tensor) -> Tensor:
    if _parallel():
        dist.all_reduce(product)
    return product


def _same_everywhere(directions: Tensor) -> Tensor:
    """Equal inputs give equal decompositions on equal machines only."""
    if _parallel():
        dist.broadcast(directions, 0)
    return directions
