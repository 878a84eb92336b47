"""`lrcompile_kernels::sum_of_products` and `factor_gradients`: the two products around a low-rank pair.

They have no autograd of their own: only functions of `lrcompile.lowered` call them, where a backward is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

LIBRARY = torch.library.Library("lrcompile_kernels", "FRAGMENT")

LIBRARY.define("sum_of_products(Tensor[] xs, Tensor[] Ms, Tensor? bias) -> Tensor")
LIBRARY.define("factor_gradients(Tensor dy, Tensor B, Tensor S) -> (Tensor, Tensor)")


@torch.library.impl(LIBRARY, "sum_of_products", "CompositeExplicitAutograd")
def sum_of_products(xs: Sequence[Tensor], Ms: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """y = Σᵢ xᵢ·Mᵢ + b in one buffer.

    xᵢ `[rows, kᵢ]`, Mᵢ `[kᵢ, columns]` in any storage order, b `[columns]`, y `[rows, columns]`, all of one dtype.
    Every product but the first is accumulated where the first was written, so the sum costs no pass of its own.
    """
    y = xs[0] @ Ms[0] if bias is None else torch.addmm(bias, xs[0], Ms[0])
    for x, M in zip(xs[1:], Ms[1:], strict=True):
        y.addmm_(x, M)
    return y


@torch.library.register_fake("lrcompile_kernels::sum_of_products", lib=LIBRARY)
def _(xs: Sequence[Tensor], Ms: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    return xs[0].new_empty(xs[0].shape[0], Ms[0].shape[1])


@register_flop_formula(torch.ops.lrcompile_kernels.sum_of_products)
def _(xs: Sequence[Any], Ms: Sequence[Any], bias: Any, *, out_shape: Any = None, **_: Any) -> int:
    return sum(2 * x[0] * M[0] * M[1] for x, M in zip(xs, Ms, strict=True))


@torch.library.impl(LIBRARY, "factor_gradients", "CompositeExplicitAutograd")
def factor_gradients(dy: Tensor, B: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """dS = dy·B and dB = dyᵀ·S, from one reading of dy where a kernel can.

    dy `[rows, out]`, B `[out, rank]`, S `[rows, rank]`; dS as S, dB as B.
    """
    return dy @ B, dy.t() @ S


@torch.library.register_fake("lrcompile_kernels::factor_gradients", lib=LIBRARY)
def _(dy: Tensor, B: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    return dy.new_empty(dy.shape[0], B.shape[1]), dy.new_empty(dy.shape[1], S.shape[1])


@register_flop_formula(torch.ops.lrcompile_kernels.factor_gradients)
def _(dy: Any, B: Any, S: Any, *, out_shape: Any = None, **_: Any) -> int:
    return 2 * dy[0] * dy[1] * (B[1] + S[1])
