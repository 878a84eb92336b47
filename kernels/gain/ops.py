"""`lrcompile_kernels::gain_gradients`: both gradients of y' = (y − c) ⊙ g + c, from one dy' that is in memory once.

It has no autograd of its own: only functions of `lrcompile.lowered` call it, where a backward is written. One
operation, because a compiler writes out whatever makes dy' a second time for the sum over rows otherwise, and a third
time for dy' ⊙ g: on a CPU most of what compiling gains would take.
"""

from __future__ import annotations

import torch
from torch import Tensor

LIBRARY = torch.library.Library("lrcompile_kernels", "FRAGMENT")
LIBRARY.define("gain_gradients(Tensor dy, Tensor y, Tensor m, Tensor? n, Tensor? kept) -> (Tensor, Tensor)")


@torch.library.impl(LIBRARY, "gain_gradients", "CompositeExplicitAutograd")
def gain_gradients(dy: Tensor, y: Tensor, m: Tensor, n: Tensor | None, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """∂y = dy' ⊙ g and ∂m = Σ dy' ⊙ (y − c) / n `[out]` for g = m/n, the sum over all rows; n None for ones, c None for
    zeros.

    dy' and y `[..., out]` of one dtype, m, n and c `kept` `[out]`. Computed in float32 or wider; ∂y is contiguous, in
    y's dtype, and ∂m in m's. RuntimeError where the shapes do not fit each other.
    """
    _check(dy, y, m, n, kept)
    if not y.numel():  # the kernel divides by the number of rows
        return torch.empty_like(y), torch.zeros_like(m)
    wide = torch.promote_types(y.dtype, torch.float32)
    g = m.to(wide) if n is None else m.to(wide) / n.to(wide)
    c = torch.zeros_like(g) if kept is None else kept.to(wide)
    rows = [each.reshape(-1, y.shape[-1]).contiguous() for each in (dy, y)]
    # The gradients of a normalization by the mean c, the variance 1 and the weight g: a kernel without a temporary. In
    # 16 bits its dy is three times quicker than a product of two dtypes; in float32, where it goes one by one, the
    # product takes half as long, though it reads dy' again.
    ones, narrow = torch.ones_like(g), y.dtype != wide
    wanted = [narrow, True, False]
    dx, dg, _ = torch.ops.aten.native_batch_norm_backward(*rows, g, c, ones, None, None, False, 0.0, wanted)
    return (dx if narrow else rows[0] * g).view(y.shape), (dg if n is None else dg / n).to(m.dtype)


def _check(dy: Tensor, y: Tensor, m: Tensor, n: Tensor | None, kept: Tensor | None) -> None:
    vectors = {"m": m, "n": n, "kept": kept}
    fits = dy.shape == y.shape and dy.dtype == y.dtype and y.dim() > 0
    torch._check(
        fits and all(each is None or each.shape == y.shape[-1:] for each in vectors.values()),
        lambda: (
            f"gain_gradients: dy {tuple(dy.shape)} {dy.dtype}, y {tuple(y.shape)} {y.dtype}, "
            + ", ".join(f"{name} {None if each is None else tuple(each.shape)}" for name, each in vectors.items())
            + "; expected dy and y [..., out] of one dtype, [out] for m, and [out] or None for the others"
        ),
    )


@torch.library.register_fake("lrcompile_kernels::gain_gradients", lib=LIBRARY)
def _(dy: Tensor, y: Tensor, m: Tensor, n: Tensor | None, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    _check(dy, y, m, n, kept)
    return y.new_empty(y.shape), torch.empty_like(m)
