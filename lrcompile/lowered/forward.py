"""The forward products of a group of maps (see `group`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lrcompile.kernels.dropout import ops as dropout_ops  # registers the leaf ops
from lrcompile.kernels.lora_group import assembling as assembling
from lrcompile.kernels.lora_group import ops as ops
from lrcompile.kernels.lora_linear.ops import scaled
from lrcompile.lowered.bases import FORWARD, Dense, Quantized
from lrcompile.lowered.members import Group, Wanted
from lrcompile.lowered.operands import Operands


def codes(wanted: Wanted, given: Operands, x: Tensor) -> dict[int, Tensor]:
    """S of every code that an output or a gradient reads; those without dropout from one product."""
    group = wanted.group
    found = [code for code in range(group.codes) if group.acts(code) or wanted.S(code)]
    plain = [code for code in found if not group.drops[code]]
    S: dict[int, Tensor] = {}
    if plain:
        As = [given.As[code] for code in plain]
        S = dict(zip(plain, product(x, stack(As, 0, FORWARD).t()).split([A.shape[0] for A in As], 1), strict=True))
    for code in found:
        if group.drops[code]:
            dropped = torch.ops.lrcompile_kernels.drop(x, given.seeds[code], group.drops[code], dropout_ops.FORWARD)
            S[code] = product(dropped, given.As[code].t())
    return S


def merged(group: Group, given: Operands, dtype: torch.dtype) -> list[Tensor | None]:
    """W'ᵀ = Wᵀ + (sBA)ᵀ `[in, out]` of each member that is computed so."""
    Ms: list[Tensor | None] = []
    for member, held, B, scale in zip(group.members, given.held, given.Bs, given.scales, strict=True):
        if member.order.merged:
            base = member.base.matrix(held, dtype, FORWARD)
            Ms.append(torch.addmm(base, given.As[member.code].to(dtype).t(), scaled(B, scale, dtype).t()))
        else:
            Ms.append(None)
    return Ms


def outputs(
    group: Group, given: Operands, x: Tensor, S: dict[int, Tensor], Ms: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """Every yᵢ; several dense ones that all act through their factors are one operation."""
    dtype = x.dtype
    if len(given.Bs) > 1 and all(group.acts(each.code) and isinstance(each.base, Dense) for each in group.members):
        each = zip(group.members, given.held, strict=True)
        return tuple(
            torch.ops.lrcompile_kernels.group_products(
                x,
                [member.base.matrix(held, dtype, FORWARD).t() for member, held in each],
                [None if bias is None else bias.to(dtype) for bias in given.biases],
                [S[member.code] for member in group.members],
                given.Bs,
                given.scales,
            )
        )
    return tuple(_output(group, given, x, S, M, i) for i, M in enumerate(Ms))


def _output(group: Group, given: Operands, x: Tensor, S: dict[int, Tensor], M: Tensor | None, index: int) -> Tensor:
    member, bias, dtype = group.members[index], given.biases[index], x.dtype
    B, scale = given.Bs[index], given.scales[index]
    acts = group.acts(member.code)
    if isinstance(member.base, Quantized) and member.base.by_codes:
        y = member.base.product(given.held[index], x, bias)
        return torch.addmm(y, S[member.code], scaled(B, scale, dtype).t()) if acts else y
    computed = member.base.computes_in(dtype)
    xs, Ms = [x.to(computed)], [member.base.matrix(given.held[index], computed, FORWARD) if M is None else M]
    bias = None if bias is None else bias.to(computed)
    if acts and computed == dtype:
        return torch.ops.lrcompile_kernels.sum_of_products([*xs, S[member.code]], [*Ms, B.t()], bias, scale)
    y = torch.ops.lrcompile_kernels.sum_of_products(xs, Ms, bias).to(dtype)
    return torch.addmm(y, S[member.code], scaled(B, scale, dtype).t()) if acts else y


def product(x: Tensor, M: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x·M computed in x's dtype, in `dtype` if that is another."""
    dtype = dtype or x.dtype
    return x @ M if M.dtype == dtype == x.dtype else torch.ops.lrcompile_kernels.cast_product(x, M, dtype)


def stack(parts: Sequence[Tensor], dim: int, phase: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.ops.lrcompile_kernels.stacked(parts, dim, phase)
