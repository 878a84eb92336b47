"""`lrcompile::nf4_linear`, the one opaque op of the dialect: y = x·dq(W)ᵀ + b with W kept as NF4 codes.

Plain autograd would keep the dequantized weight alive until the backward pass and lose QLoRA's memory. So the op is
opaque to autograd and to AOT's partitioner, saves nothing but the codes, and dequantizes again: δx = δy·dq(W) is the
same op with its two features exchanged and the other storage order, which also makes it differentiable to any order.
Lowerings replace it by `nf4_linear_aten`; it must not be written into a file, since a fresh process could not load it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lrcompile.dialect import LIBRARY
from lrcompile.kernels.nf4_dequant import Nf4, Tables
from lrcompile.kernels.nf4_linear import nf4_linear as reference
from lrcompile.kernels.nf4_linear.ops import SCHEMA, fake, flops

LIBRARY.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))


def nf4_linear_aten(
    x: Tensor, codes: Tensor, absmax: Tensor, absmax_scale: Tensor | None, absmax_offset: Tensor | None,
    bias: Tensor | None, out_features: int, in_features: int, block_size: int, transposed: bool,
    compute_dtype: torch.dtype, pairs: Tensor | None = None, dynamic: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The op spelled in torch's own, to lower it by: same arguments, same numbers, traceable and differentiable.

    `pairs` and `dynamic` are the two code tables where the caller holds them already (see the pass `expand-nf4`).
    """
    nf4 = Nf4(codes, absmax, absmax_scale, absmax_offset)
    constants = None if pairs is None or dynamic is None else Tables(pairs, dynamic)
    return reference(
        x, nf4, bias, out_features, in_features, block_size, transposed, compute_dtype, whole=True, constants=constants
    )


@torch.library.impl(LIBRARY, "nf4_linear", "CompositeExplicitAutograd")
def _kernel(*args: Any) -> Tensor:
    """Once autograd and autocast are done, the op is that of the kernels, which knows the ways of each device."""
    return torch.ops.lrcompile_kernels.nf4_linear(*args)


torch.library.register_fake("lrcompile::nf4_linear", fake, lib=LIBRARY)
register_flop_formula(torch.ops.lrcompile.nf4_linear)(flops)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, absmax, absmax_scale, absmax_offset, bias, *ctx.layout = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(codes, absmax, absmax_scale, absmax_offset)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """δx = δy·dq(W);  δb = Σ δy over every leading dimension."""
    dx = db = None
    if ctx.needs_input_grad[0]:
        out_features, in_features, block_size, transposed, compute_dtype = ctx.layout
        dx = torch.ops.lrcompile.nf4_linear(
            dy, *ctx.saved_tensors, None, in_features, out_features, block_size, not transposed, compute_dtype
        )
    if ctx.needs_input_grad[5]:
        summed = dy.sum(tuple(range(dy.dim() - 1)), dtype=torch.promote_types(dy.dtype, ctx.bias_dtype))
        db = (dy if dy.dim() == 1 else summed).to(ctx.bias_dtype)
    return dx, None, None, None, None, db, None, None, None, None, None


torch.library.register_autograd("lrcompile::nf4_linear", _backward, setup_context=_save, lib=LIBRARY)


def _autocast(device_type: str, x: Tensor, *rest: Any) -> Tensor:
    """A linear map computes and answers in autocast's dtype; float64 is left alone, as everywhere under it."""
    *args, compute_dtype = rest
    if x.device.type == device_type and x.is_floating_point() and x.dtype != torch.float64:
        lower = torch.get_autocast_dtype(device_type)
        x = x.to(lower)
        compute_dtype = lower if compute_dtype != torch.float64 else compute_dtype
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(_AUTOCAST_KEYS[device_type])):
        return torch.ops.lrcompile.nf4_linear(x, *args, compute_dtype)


_AUTOCAST_KEYS = {"cpu": torch._C.DispatchKey.AutocastCPU, "cuda": torch._C.DispatchKey.AutocastCUDA}
for _device_type, _key in _AUTOCAST_KEYS.items():
    LIBRARY.impl("nf4_linear", partial(_autocast, _device_type), _key.name)
