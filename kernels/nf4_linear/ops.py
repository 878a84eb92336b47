"""`lrcompile_kernels::nf4_linear`: y = x·dq(W)ᵀ + b, by whichever way is fastest where x is.

It has no autograd of its own: the dialect's `lrcompile::nf4_linear`, of the same arguments, has, and calls it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lrcompile.kernel_tools.shapes import capability, shape_class
from lrcompile.kernel_tools.tuning import Way, run_fastest
from lrcompile.kernels.nf4_dequant.checking import checked_storage
from lrcompile.kernels.nf4_dequant.ops import FORWARD, LIBRARY
from lrcompile.kernels.nf4_dequant.storage import Nf4, kept_tables
from lrcompile.kernels.nf4_linear.cost import best_path, paths
from lrcompile.kernels.nf4_linear.reference import nf4_linear as reference

SCHEMA = (
    "nf4_linear(Tensor x, Tensor codes, Tensor absmax, Tensor? absmax_scale, Tensor? absmax_offset, Tensor? bias, "
    "int out_features, int in_features, int block_size, bool transposed, ScalarType compute_dtype) -> Tensor"
)
LIBRARY.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))


def checked(
    x: Tensor, codes: Tensor, absmax: Tensor, absmax_scale: Tensor | None, absmax_offset: Tensor | None,
    bias: Tensor | None, out_features: int, in_features: int, block_size: int,
) -> Nf4:  # fmt: skip
    """The same refusals from every kernel and from their fakes."""
    torch._check(x.is_floating_point(), lambda: f"nf4_linear: x is {x.dtype}, expected a floating dtype")
    torch._check(x.dim() > 0, lambda: "nf4_linear: x is 0-d, expected [..., in_features]")
    torch._check(
        x.shape[-1] == in_features,
        lambda: f"nf4_linear: x is {tuple(x.shape)}, expected [..., {in_features}] (in_features)",
    )
    torch._check(
        bias is None or bias.shape == (out_features,),
        lambda: f"nf4_linear: bias is {tuple(bias.shape) if bias is not None else None}, expected ({out_features},)",
    )
    return checked_storage(
        "nf4_linear", codes, absmax, absmax_scale, absmax_offset, out_features, in_features, block_size
    )


@torch.library.impl(LIBRARY, "nf4_linear", "CompositeExplicitAutograd")
def nf4_linear(
    x: Tensor, codes: Tensor, absmax: Tensor, absmax_scale: Tensor | None, absmax_offset: Tensor | None,
    bias: Tensor | None, out_features: int, in_features: int, block_size: int, transposed: bool,
    compute_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """y = x·dq(W)ᵀ + b, or x·dq(W) + b when W is stored transposed, `[in, out]`  (arXiv 2305.14314).

    x `[..., in]`, bias `[out]`, storage as in `Nf4`; weight, product and sum in `compute_dtype`, y `[..., out]` in x's
    dtype. RuntimeError where the shapes do not fit each other.
    """
    nf4 = checked(x, codes, absmax, absmax_scale, absmax_offset, bias, out_features, in_features, block_size)
    return reference(
        x, nf4, bias, out_features, in_features, block_size, transposed, compute_dtype, constants=kept_tables(x.device)
    )


@torch.library.impl(LIBRARY, "nf4_linear", "CUDA")
def fastest_nf4_linear(
    x: Tensor, codes: Tensor, absmax: Tensor, absmax_scale: Tensor | None, absmax_offset: Tensor | None,
    bias: Tensor | None, out_features: int, in_features: int, block_size: int, transposed: bool,
    compute_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """As `nf4_linear`; what a kernel forms is c·Σx or c·m in 16 bits, each within a rounding of `compute_dtype`."""
    stored = list(checked(x, codes, absmax, absmax_scale, absmax_offset, bias, out_features, in_features, block_size))
    rows = x.to(compute_dtype).reshape(math.prod(x.shape[:-1]), in_features).contiguous()
    op = ["nf4_linear", "xW" if transposed else "xWᵀ", str(block_size)]
    op += ["double"] * (absmax_scale is not None) + ["biased"] * (bias is not None)
    shape = shape_class(" ".join(op), compute_dtype, rows.shape[0], (out_features, in_features), (), x.device)
    ways = partial(ways_to_multiply, rows, stored, bias, out_features, block_size, transposed)
    y = run_fastest(shape, ways, rows, stored, bias, out_features, block_size, transposed)
    return y.view(*x.shape[:-1], out_features).to(x.dtype)


def ways_to_multiply(
    x: Tensor, stored: Sequence[Tensor | None], bias: Tensor | None, out_features: int, block_size: int,
    transposed: bool,
) -> Mapping[str, Way]:  # fmt: skip
    """Dequantizing first, and every configuration of the kernels that take these; the one predicted fastest leads."""
    rows, in_features = 1 << max(x.shape[0] - 1, 0).bit_length(), x.shape[1]
    able = capability(x.device)
    ways: dict[str, Way] = {}
    for path in paths(rows, out_features, in_features, x.dtype, block_size, transposed) if x.numel() and able else ():
        if path != "dequantize":
            from lrcompile.kernels.nf4_linear import fused

            ways |= fused.ways(path, able, rows)
    ways["dequantize"] = dequantized_linear
    best = best_path(rows, out_features, in_features, x.dtype, block_size, transposed)
    first = next((name for name in ways if name.startswith(best)), "dequantize")
    return {first: ways[first], **ways}


def dequantized_linear(
    x: Tensor, stored: Sequence[Tensor | None], bias: Tensor | None, out_features: int, block_size: int,
    transposed: bool,
) -> Tensor:  # fmt: skip
    """W into a buffer, then the vendor's product: each at its best, and nothing to gain once rows are many."""
    rows, columns = (x.shape[1], out_features) if transposed else (out_features, x.shape[1])
    W = torch.ops.lrcompile_kernels.nf4_dequantize(*stored, rows, columns, block_size, x.dtype, FORWARD)
    return F.linear(x, W.t() if transposed else W, None if bias is None else bias.to(x.dtype))


@torch.library.register_fake("lrcompile_kernels::nf4_linear", lib=LIBRARY)
def fake(
    x: Tensor, codes: Tensor, absmax: Tensor, absmax_scale: Tensor | None, absmax_offset: Tensor | None,
    bias: Tensor | None, out_features: int, in_features: int, block_size: int, transposed: bool,
    compute_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    checked(x, codes, absmax, absmax_scale, absmax_offset, bias, out_features, in_features, block_size)
    return x.new_empty((*x.shape[:-1], out_features))


def flops(x: Any, codes: Any, absmax: Any, absmax_scale: Any, absmax_offset: Any, bias: Any, out_features: int, *_: Any,
          out_shape: Any = None, **__: Any) -> int:  # fmt: skip
    return 2 * math.prod(x) * out_features


register_flop_formula(torch.ops.lrcompile_kernels.nf4_linear)(flops)
