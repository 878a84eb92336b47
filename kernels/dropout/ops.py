"""`lrcompile_kernels::drop`: dropout with the mask of a seed.

It has no autograd of its own: only functions of `lrcompile.lowered` call it, where a backward is written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lrcompile.kernels.dropout.reference import mask

FORWARD, BACKWARD = 0, 1

LIBRARY = torch.library.Library("lrcompile_kernels", "FRAGMENT")
LIBRARY.define("drop(Tensor x, Tensor seed, float p, int phase) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.impl(LIBRARY, "drop", "CompositeExplicitAutograd")
def drop(x: Tensor, seed: Tensor, p: float, phase: int) -> Tensor:
    """x ⊙ m(seed), m zero with probability p and 1/(1 − p) otherwise.

    x of a floating dtype, seed int64 0-d on x's device, 0 ≤ p < 1; the result is contiguous. The mask depends on x's
    shape, dtype and device and on the seed, on nothing else. `phase`, FORWARD or BACKWARD, has no effect on the value:
    it tells the two passes of a training step apart, so that no dropped x is one common subexpression of both and
    lives in between. RuntimeError for another p.
    """
    torch._check(0 <= p < 1, lambda: f"drop: p is {p}, expected 0 <= p < 1")
    return mask(x, p, int(seed)).mul_(x)


@torch.library.impl(LIBRARY, "drop", "CUDA")
def _(x: Tensor, seed: Tensor, p: float, phase: int) -> Tensor:
    torch._check(0 <= p < 1, lambda: f"drop: p is {p}, expected 0 <= p < 1")
    # Imported late: Triton is not there on a machine without a GPU.
    from lrcompile.kernels.dropout.fused import FLOATS, drop

    if x.dtype not in FLOATS:
        return mask(x, p, int(seed)).mul_(x)
    return drop(x, seed, p)


@torch.library.register_fake("lrcompile_kernels::drop", lib=LIBRARY)
def _(x: Tensor, seed: Tensor, p: float, phase: int) -> Tensor:
    return x.new_empty(x.shape)
