"""`lrcompile_kernels::group_products` and `group_gradients`: as in `lora_linear`, for maps that share their input.

They have no autograd of their own: only functions of `lrcompile.lowered` call them, where a backward is written. On a
CUDA device each is what was measured to be fastest there: a map at a time, or one launch for all low-rank pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lrcompile.kernel_tools.shapes import capability, shape_class, storage
from lrcompile.kernel_tools.tuning import Way, run_fastest
from lrcompile.kernels.lora_linear.ops import (
    LARGEST_RANK,
    LIBRARY,
    factor_gradients,
    fastest_factor_gradients,
    fastest_sum_of_products,
    for_triton,
    fp32_precision,
    scaled,
    sum_of_products,
)

Maybe = Sequence[Tensor | None]

LIBRARY.define(
    "group_products(Tensor x, Tensor[] Ws, Tensor?[] biases, Tensor[] Ss, Tensor[] Bs, Tensor?[] scales) -> Tensor[]"
)
LIBRARY.define("group_gradients(Tensor[] dys, Tensor[] Bs, Tensor[] Ss, Tensor?[] scales) -> (Tensor[], Tensor[])")


@torch.library.impl(LIBRARY, "group_products", "CompositeExplicitAutograd")
def group_products(
    x: Tensor, Ws: Sequence[Tensor], biases: Maybe, Ss: Sequence[Tensor], Bs: Sequence[Tensor], scales: Maybe
) -> list[Tensor]:
    """yᵢ = x·Wᵢᵀ + bᵢ + sᵢ·Sᵢ·Bᵢᵀ for every i.

    x `[rows, in]`, Wᵢ `[outᵢ, in]` in any storage order, bᵢ `[outᵢ]` or None, Bᵢ `[outᵢ, rankᵢ]`, Sᵢ `[rows, rankᵢ]`,
    which may be columns of one matrix; yᵢ `[rows, outᵢ]`. Bᵢ may have a dtype of its own.
    """
    each = zip(Ws, biases, Ss, Bs, scales, strict=True)
    return [sum_of_products((x, S), (W.t(), B.t()), bias, scale) for W, bias, S, B, scale in each]


@torch.library.impl(LIBRARY, "group_products", "CUDA")
def fastest_group_products(
    x: Tensor, Ws: Sequence[Tensor], biases: Maybe, Ss: Sequence[Tensor], Bs: Sequence[Tensor], scales: Maybe
) -> list[Tensor]:
    Bs = _cast(Bs, scales, x.dtype)
    given = "".join("-" if bias is None else "b" for bias in biases)
    op = f"group_products {given} {storage((x, *Ws, *Ss, *Bs))} {fp32_precision()}"
    widths = (x.shape[1], *(W.shape[0] for W in Ws))
    shape = shape_class(op, x.dtype, x.shape[0], widths, tuple(B.shape[1] for B in Bs), x.device)
    return run_fastest(shape, partial(ways_to_multiply, x, Ws, biases, Ss, Bs), x, Ws, biases, Ss, Bs)


def _cast(Bs: Sequence[Tensor], scales: Maybe, dtype: torch.dtype) -> list[Tensor]:
    return [scaled(B, scale, dtype) for B, scale in zip(Bs, scales, strict=True)]


def ways_to_multiply(
    x: Tensor, Ws: Sequence[Tensor], biases: Maybe, Ss: Sequence[Tensor], Bs: Sequence[Tensor]
) -> Mapping[str, Way]:
    """Each map by itself, in its fastest way; or cuBLAS for the wide products and one launch that adds the narrow."""
    ways: dict[str, Way] = {"each": _each_product}
    rows_contiguous = all(matrix.stride(1) == 1 for matrix in (*Ss, *Bs))
    if for_triton((x, *Ws, *Ss, *Bs)) and rows_contiguous and max(B.shape[1] for B in Bs) <= LARGEST_RANK:
        from lrcompile.kernels.lora_group import fused

        known = fused.configs(capability(x.device), x.dtype, len(Ws))
        ways |= {str(config): partial(fused.group_products, config=config) for config in known}
    return ways


def _each_product(
    x: Tensor, Ws: Sequence[Tensor], biases: Maybe, Ss: Sequence[Tensor], Bs: Sequence[Tensor]
) -> list[Tensor]:
    each = zip(Ws, biases, Ss, Bs, strict=True)
    return [fastest_sum_of_products((x, S), (W.t(), B.t()), bias) for W, bias, S, B in each]


@torch.library.register_fake("lrcompile_kernels::group_products", lib=LIBRARY)
def _(
    x: Tensor, Ws: Sequence[Tensor], biases: Maybe, Ss: Sequence[Tensor], Bs: Sequence[Tensor], scales: Maybe
) -> list[Tensor]:
    return [x.new_empty(x.shape[0], W.shape[0]) for W in Ws]


@register_flop_formula(torch.ops.lrcompile_kernels.group_products)
def _(x: Any, Ws: Any, biases: Any, Ss: Any, Bs: Any, scales: Any, *, out_shape: Any = None, **_: Any) -> int:
    return sum(2 * x[0] * W[0] * (W[1] + B[1]) for W, B in zip(Ws, Bs, strict=True))


@torch.library.impl(LIBRARY, "group_gradients", "CompositeExplicitAutograd")
def group_gradients(
    dys: Sequence[Tensor], Bs: Sequence[Tensor], Ss: Sequence[Tensor], scales: Maybe
) -> tuple[list[Tensor], list[Tensor]]:
    """dSᵢ = sᵢ·dyᵢ·Bᵢ and dBᵢ = sᵢ·dyᵢᵀ·Sᵢ for every i, from one reading of each dyᵢ where a kernel can."""
    both = [factor_gradients(*each) for each in zip(dys, Bs, Ss, scales, strict=True)]
    return [dS for dS, _ in both], [dB for _, dB in both]


@torch.library.impl(LIBRARY, "group_gradients", "CUDA")
def fastest_group_gradients(
    dys: Sequence[Tensor], Bs: Sequence[Tensor], Ss: Sequence[Tensor], scales: Maybe
) -> tuple[list[Tensor], list[Tensor]]:
    own, Bs = [B.dtype for B in Bs], _cast(Bs, scales, dys[0].dtype)
    op = f"group_gradients {storage((*dys, *Bs, *Ss))} {fp32_precision()}"
    widths, ranks = tuple(B.shape[0] for B in Bs), tuple(B.shape[1] for B in Bs)
    shape = shape_class(op, dys[0].dtype, dys[0].shape[0], widths, ranks, dys[0].device)
    dSs, dBs = run_fastest(shape, partial(ways_to_differentiate, dys, Bs, Ss), dys, Bs, Ss)
    return dSs, [scaled(*each) for each in zip(dBs, scales, own, strict=True)]


def ways_to_differentiate(dys: Sequence[Tensor], Bs: Sequence[Tensor], Ss: Sequence[Tensor]) -> Mapping[str, Way]:
    """Each map by itself, in its fastest way; or one launch for all."""
    ways: dict[str, Way] = {"each": _each_gradient}
    if for_triton((*dys, *Bs, *Ss)):
        from lrcompile.kernels.lora_linear import fused_gradients as fused

        known = fused.configs(capability(dys[0].device), dys, Bs, Ss)
        ways |= {str(config): partial(fused.factor_gradients, config=config) for config in known}
    return ways


def _each_gradient(
    dys: Sequence[Tensor], Bs: Sequence[Tensor], Ss: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    both = [fastest_factor_gradients(dy, B, S) for dy, B, S in zip(dys, Bs, Ss, strict=True)]
    return [dS for dS, _ in both], [dB for _, dB in both]


@torch.library.register_fake("lrcompile_kernels::group_gradients", lib=LIBRARY)
def _(
    dys: Sequence[Tensor], Bs: Sequence[Tensor], Ss: Sequence[Tensor], scales: Maybe
) -> tuple[list[Tensor], list[Tensor]]:
    dSs = [dy.new_empty(dy.shape[0], B.shape[1]) for dy, B in zip(dys, Bs, strict=True)]
    return dSs, [B.new_empty(B.shape) for B in Bs]


@register_flop_formula(torch.ops.lrcompile_kernels.group_gradients)
def _(dys: Any, Bs: Any, Ss: Any, scales: Any, *, out_shape: Any = None, **_: Any) -> int:
    return sum(2 * dy[0] * dy[1] * (B[1] + S[1]) for dy, B, S in zip(dys, Bs, Ss, strict=True))
