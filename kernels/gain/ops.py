"""`lrcompile_kernels::gain_gradient`: what trains g in y' = (y − c) ⊙ g + c, from one reading of dy' and y.

It has no autograd of its own: only functions of `lrcompile.lowered` call it, where a backward is written. One
operation, because a compiler writes out whatever makes dy' a second time for the sum over rows otherwise: on a CPU most
of what compiling gains would take.
"""

from __future__ import annotations

import torch
from torch import Tensor

LIBRARY = torch.library.Library("lrcompile_kernels", "FRAGMENT")
LIBRARY.define("gain_gradient(Tensor dy, Tensor y, Tensor? n, Tensor? kept, ScalarType dtype) -> Tensor")


@torch.library.impl(LIBRARY, "gain_gradient", "CompositeExplicitAutograd")
def gain_gradient(dy: Tensor, y: Tensor, n: Tensor | None, kept: Tensor | None, dtype: torch.dtype) -> Tensor:
    """∂m = Σ dy' ⊙ (y − c) / n `[out]` for g = m/n, the sum over all rows; n None for ones, c None for zeros.

    dy' and y `[..., out]` of one dtype, n and c `kept` `[out]`. Summed in float32 or wider, given in `dtype`.
    RuntimeError where the shapes do not fit each other.
    """
    _check(dy, y, n, kept)
    if not y.numel():  # the kernel divides by the number of rows
        return y.new_zeros(y.shape[-1], dtype=dtype)
    wide = torch.promote_types(y.dtype, torch.float32)
    ones = torch.ones(y.shape[-1], dtype=wide, device=y.device)
    c = torch.zeros_like(ones) if kept is None else kept.to(wide)
    rows = [each.reshape(-1, y.shape[-1]).contiguous() for each in (dy, y)]
    # The gradient of the weight of a normalization by the mean c and the variance 1: a kernel without a temporary.
    wanted = [False, True, False]
    _, dg, _ = torch.ops.aten.native_batch_norm_backward(*rows, ones, c, ones, None, None, False, 0.0, wanted)
    return (dg if n is None else dg / n).to(dtype)


def _check(dy: Tensor, y: Tensor, n: Tensor | None, kept: Tensor | None) -> None:
    vectors = {"n": n, "kept": kept}
    fits = dy.shape == y.shape and dy.dtype == y.dtype and y.dim() > 0
    torch._check(
        fits and all(each is None or each.shape == y.shape[-1:] for each in vectors.values()),
        lambda: (
            f"gain_gradient: dy {tuple(dy.shape)} {dy.dtype}, y {tuple(y.shape)} {y.dtype}, "
            + ", ".join(f"{name} {None if each is None else tuple(each.shape)}" for name, each in vectors.items())
            + "; expected dy and y [..., out] of one dtype, and [out] or None for the others"
        ),
    )


@torch.library.register_fake("lrcompile_kernels::gain_gradient", lib=LIBRARY)
def _(dy: Tensor, y: Tensor, n: Tensor | None, kept: Tensor | None, dtype: torch.dtype) -> Tensor:
    _check(dy, y, n, kept)
    return y.new_empty(y.shape[-1], dtype=dtype)
