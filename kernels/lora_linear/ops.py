"""`lrcompile_kernels::sum_of_products` and `factor_gradients`: the two products around a low-rank pair.

They have no autograd of their own: only functions of `lrcompile.lowered` call them, where a backward is written. On a
CUDA device each is what was measured to be fastest there: aten's products, or a Triton kernel of this folder.
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

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
"""What the Triton kernels multiply."""
MOST_PRODUCTS = 5
LARGEST_RANK = 256

LIBRARY = torch.library.Library("lrcompile_kernels", "FRAGMENT")

LIBRARY.define("sum_of_products(Tensor[] xs, Tensor[] Ms, Tensor? bias, Tensor? scale=None) -> Tensor")
LIBRARY.define("factor_gradients(Tensor dy, Tensor B, Tensor S, Tensor? scale=None) -> (Tensor, Tensor)")
LIBRARY.define("cast_product(Tensor x, Tensor M, ScalarType dtype, Tensor? scale=None) -> Tensor")


def scaled(factor: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """s·factor in `dtype`, multiplied in the wider of that and the factor's."""
    if scale is None:
        return factor.to(dtype)
    wide = torch.promote_types(factor.dtype, dtype)
    return (factor.to(wide) * scale.to(wide)).to(dtype)


@torch.library.impl(LIBRARY, "sum_of_products", "CompositeExplicitAutograd")
def sum_of_products(
    xs: Sequence[Tensor], Ms: Sequence[Tensor], bias: Tensor | None, scale: Tensor | None = None
) -> Tensor:
    """y = Σᵢ xᵢ·Mᵢ + b in one buffer, the last product times `scale`.

    xᵢ `[rows, kᵢ]`, Mᵢ `[kᵢ, columns]` in any storage order, b `[columns]`, y `[rows, columns]`, all of one dtype but
    the last Mᵢ, the factor, which may have another. Every product but the first is accumulated where the first was
    written, so the sum costs no pass of its own.
    """
    Ms = _cast(Ms, scale, xs[0].dtype)
    y = xs[0] @ Ms[0] if bias is None else torch.addmm(bias, xs[0], Ms[0])
    for x, M in zip(xs[1:], Ms[1:], strict=True):
        y.addmm_(x, M)
    return y


@torch.library.impl(LIBRARY, "sum_of_products", "CUDA")
def fastest_sum_of_products(
    xs: Sequence[Tensor], Ms: Sequence[Tensor], bias: Tensor | None, scale: Tensor | None = None
) -> Tensor:
    Ms = _cast(Ms, scale, xs[0].dtype)
    op = f"sum_of_products{'' if bias is None else ' + b'} {storage((*xs, *Ms))} {fp32_precision()}"
    shape = shape_class(op, xs[0].dtype, xs[0].shape[0], (*(M.shape[0] for M in Ms), Ms[0].shape[1]), (), xs[0].device)
    return run_fastest(shape, partial(ways_to_sum, xs, Ms, bias), xs, Ms, bias)


def _cast(Ms: Sequence[Tensor], scale: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    return [*Ms[:-1], scaled(Ms[-1], scale, dtype)]


def ways_to_sum(xs: Sequence[Tensor], Ms: Sequence[Tensor], bias: Tensor | None) -> Mapping[str, Way]:
    """aten, and the configurations of both kernels where the last product is narrow and there are not too many."""
    ways: dict[str, Way] = {"aten": sum_of_products}
    operands = [*xs, *Ms] if bias is None else [*xs, *Ms, bias]
    if 2 <= len(xs) <= MOST_PRODUCTS and xs[-1].shape[1] <= LARGEST_RANK and for_triton(operands):
        from lrcompile.kernels.lora_linear import fused, fused_tma

        for name, kernels in (("pointers", fused), ("tma", fused_tma)):
            known = kernels.configs(capability(xs[0].device), xs, Ms)
            ways |= {f"{name} {config}": partial(kernels.sum_of_products, config=config) for config in known}
    return ways


def for_triton(operands: Sequence[Tensor]) -> bool:
    """Whether the kernels take these: where they run, of one dtype that they multiply, none empty."""
    first = operands[0]
    same = all(operand.dtype == first.dtype and operand.numel() > 0 for operand in operands)
    return same and first.dtype in FLOATS and capability(first.device) > 0


def fp32_precision() -> str:
    """What the user allows of float32 products; part of a shape class, since it decides how fast they are."""
    return torch.backends.cuda.matmul.fp32_precision


@torch.library.register_fake("lrcompile_kernels::sum_of_products", lib=LIBRARY)
def _(xs: Sequence[Tensor], Ms: Sequence[Tensor], bias: Tensor | None, scale: Tensor | None = None) -> Tensor:
    return xs[0].new_empty(xs[0].shape[0], Ms[0].shape[1])


@register_flop_formula(torch.ops.lrcompile_kernels.sum_of_products)
def _(xs: Sequence[Any], Ms: Sequence[Any], bias: Any, scale: Any = None, *, out_shape: Any = None, **_: Any) -> int:
    return sum(2 * x[0] * M[0] * M[1] for x, M in zip(xs, Ms, strict=True))


@torch.library.impl(LIBRARY, "factor_gradients", "CompositeExplicitAutograd")
def factor_gradients(dy: Tensor, B: Tensor, S: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """dS = s·dy·B and dB = s·dyᵀ·S, from one reading of dy where a kernel can.

    dy `[rows, out]`, B `[out, rank]`, S `[rows, rank]`, s `scale`; dS as S, dB as B, which may have another dtype.
    """
    # A CPU multiplies few long rows of float32 in two thirds of the time that many short ones take.
    dB = (S.t() @ dy).t().contiguous() if dy.is_cpu and dy.dtype == torch.float32 else dy.t() @ S
    return dy @ scaled(B, scale, dy.dtype), scaled(dB, scale, B.dtype)


@torch.library.impl(LIBRARY, "factor_gradients", "CUDA")
def fastest_factor_gradients(dy: Tensor, B: Tensor, S: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    own, B = B.dtype, scaled(B, scale, dy.dtype)
    op = f"factor_gradients {storage((dy, B, S))} {fp32_precision()}"
    shape = shape_class(op, dy.dtype, dy.shape[0], (dy.shape[1],), (B.shape[1],), dy.device)
    dS, dB = run_fastest(shape, partial(ways_to_differentiate, dy, B, S), dy, B, S)
    return dS, scaled(dB, scale, own)


def ways_to_differentiate(dy: Tensor, B: Tensor, S: Tensor) -> Mapping[str, Way]:
    """aten, and the configurations of the kernel: of a group of one map."""
    ways: dict[str, Way] = {"aten": factor_gradients}
    if for_triton((dy, B, S)):
        from lrcompile.kernels.lora_linear import fused_gradients as fused

        known = fused.configs(capability(dy.device), (dy,), (B,), (S,))
        ways |= {str(config): partial(fused.factor_gradients_of_one, config=config) for config in known}
    return ways


@torch.library.register_fake("lrcompile_kernels::factor_gradients", lib=LIBRARY)
def _(dy: Tensor, B: Tensor, S: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return dy.new_empty(dy.shape[0], B.shape[1]), B.new_empty(dy.shape[1], S.shape[1])


@register_flop_formula(torch.ops.lrcompile_kernels.factor_gradients)
def _(dy: Any, B: Any, S: Any, scale: Any = None, *, out_shape: Any = None, **_: Any) -> int:
    return 2 * dy[0] * dy[1] * (B[1] + S[1])


@torch.library.impl(LIBRARY, "cast_product", "CompositeExplicitAutograd")
def cast_product(x: Tensor, M: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
    """x·M in x's dtype, or s·x·M in `dtype`: x `[rows, k]`, M `[k, columns]` of any dtype, s `scale`.

    One operation, because a compiler makes a kernel of its own for each shape of factor that is cast beside a product:
    on a CPU a file of C++, most of what compiling the adapters would take.
    """
    product = x @ M.to(x.dtype)
    if scale is not None and product.dtype == dtype:
        return product.mul_(scale)
    return scaled(product, scale, dtype)


@torch.library.register_fake("lrcompile_kernels::cast_product", lib=LIBRARY)
def _(x: Tensor, M: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape[0], M.shape[1], dtype=dtype)


@register_flop_formula(torch.ops.lrcompile_kernels.cast_product)
def _(x: Any, M: Any, dtype: Any, scale: Any = None, *, out_shape: Any = None, **_: Any) -> int:
    return 2 * x[0] * x[1] * M[1]
