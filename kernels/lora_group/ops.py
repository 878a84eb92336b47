"""`lrcompile_kernels::group_products` and `group_gradients`: as in `lora_linear`, for maps that share their input.

They have no autograd of their own: only functions of `lrcompile.lowered` call them, where a backward is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lrcompile.kernels.lora_linear.ops import LIBRARY, factor_gradients, sum_of_products

LIBRARY.define("group_products(Tensor x, Tensor[] Ws, Tensor?[] biases, Tensor[] Ss, Tensor[] Bs) -> Tensor[]")
LIBRARY.define("group_gradients(Tensor[] dys, Tensor[] Bs, Tensor[] Ss) -> (Tensor[], Tensor[])")


@torch.library.impl(LIBRARY, "group_products", "CompositeExplicitAutograd")
def group_products(
    x: Tensor, Ws: Sequence[Tensor], biases: Sequence[Tensor | None], Ss: Sequence[Tensor], Bs: Sequence[Tensor]
) -> list[Tensor]:
    """yᵢ = x·Wᵢᵀ + bᵢ + Sᵢ·Bᵢᵀ for every i.

    x `[rows, in]`, Wᵢ `[outᵢ, in]` in any storage order, bᵢ `[outᵢ]` or None, Bᵢ `[outᵢ, rankᵢ]`, Sᵢ `[rows, rankᵢ]`,
    which may be columns of one matrix; yᵢ `[rows, outᵢ]`.
    """
    each = zip(Ws, biases, Ss, Bs, strict=True)
    return [sum_of_products((x, S), (W.t(), B.t()), bias) for W, bias, S, B in each]


@torch.library.register_fake("lrcompile_kernels::group_products", lib=LIBRARY)
def _(
    x: Tensor, Ws: Sequence[Tensor], biases: Sequence[Tensor | None], Ss: Sequence[Tensor], Bs: Sequence[Tensor]
) -> list[Tensor]:
    return [x.new_empty(x.shape[0], W.shape[0]) for W in Ws]


@register_flop_formula(torch.ops.lrcompile_kernels.group_products)
def _(x: Any, Ws: Any, biases: Any, Ss: Any, Bs: Any, *, out_shape: Any = None, **_: Any) -> int:
    return sum(2 * x[0] * W[0] * (W[1] + B[1]) for W, B in zip(Ws, Bs, strict=True))


@torch.library.impl(LIBRARY, "group_gradients", "CompositeExplicitAutograd")
def group_gradients(
    dys: Sequence[Tensor], Bs: Sequence[Tensor], Ss: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """dSᵢ = dyᵢ·Bᵢ and dBᵢ = dyᵢᵀ·Sᵢ for every i, from one reading of each dyᵢ where a kernel can."""
    both = [factor_gradients(dy, B, S) for dy, B, S in zip(dys, Bs, Ss, strict=True)]
    return [dS for dS, _ in both], [dB for _, dB in both]


@torch.library.register_fake("lrcompile_kernels::group_gradients", lib=LIBRARY)
def _(dys: Sequence[Tensor], Bs: Sequence[Tensor], Ss: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    dSs = [dy.new_empty(dy.shape[0], B.shape[1]) for dy, B in zip(dys, Bs, strict=True)]
    return dSs, [dy.new_empty(dy.shape[1], S.shape[1]) for dy, S in zip(dys, Ss, strict=True)]


@register_flop_formula(torch.ops.lrcompile_kernels.group_gradients)
def _(dys: Any, Bs: Any, Ss: Any, *, out_shape: Any = None, **_: Any) -> int:
    return sum(2 * dy[0] * dy[1] * (B[1] + S[1]) for dy, B, S in zip(dys, Bs, Ss, strict=True))
