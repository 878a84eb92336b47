"""The gradients of a group of maps (see `group`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lrcompile.kernels.dropout import ops as dropout_ops  # registers the leaf ops
from lrcompile.kernels.lora_group import assembling as assembling
from lrcompile.kernels.lora_group import ops as ops
from lrcompile.lowered.bases import BACKWARD, Quantized
from lrcompile.lowered.diagonals import formed, through_diagonals
from lrcompile.lowered.forward import product, stack
from lrcompile.lowered.members import Wanted
from lrcompile.lowered.operands import Operands

Maybe = Sequence[Tensor | None]


def gradients(
    wanted: Wanted, given: Operands, x: Any, S: Maybe, Ms: Maybe, dys: Sequence[Tensor]
) -> tuple[Tensor | None, Operands]:
    """dx and the gradients of the operands, None for those that are not wanted."""
    members = len(dys)
    kept = replace(given, Bs=_apart(given.Bs), As=_apart(given.As))
    given = formed(kept, BACKWARD)
    found = Operands(
        [[None] * len(held) for held in given.held],
        [dy.sum(0) if wants else None for dy, wants in zip(dys, wanted.each.biases, strict=True)],
        [None] * members,
        [None] * members,
        [None] * wanted.group.codes,
        [None] * wanted.group.codes,
    )
    dS = _through_expands(wanted, given, S, dys, found)
    _of_A(wanted, given, x, dS, found)
    _through_weights(wanted, given, x, dys, found)
    dx = _of_x(wanted, given, Ms, dS, dys) if wanted.x else None
    return dx, through_diagonals(kept, wanted.each, found)


def _apart(factors: Maybe) -> list[Tensor | None]:
    """The same tensors as views. AOTAutograd would take a cast, scaled or stacked factor of the forward pass for that
    of the backward pass otherwise, and keep it in between; this way it keeps the factors, which are alive anyway.
    """
    return [None if factor is None else factor.view(factor.shape) for factor in factors]


def _added(parts: Sequence[Tensor]) -> Tensor | None:
    return parts[0] if len(parts) == 1 else torch.ops.lrcompile_kernels.added(parts) if parts else None


def _through_expands(
    wanted: Wanted, given: Operands, S: Sequence[Any], dys: Sequence[Tensor], found: Operands
) -> list[Any]:
    """dS of each code, and dB of each member, as far as a gradient needs them; both from one reading of dy."""
    members = wanted.group.members
    wants_dB = [wanted.B(i) and not each.order.by_weight for i, each in enumerate(members)]
    wants_dS = [wanted.dS(each.code) for each in members]
    both = [i for i in range(len(members)) if wants_dS[i] and wants_dB[i]]
    parts = {
        i: torch.ops.lrcompile_kernels.sum_of_products([dys[i]], [given.Bs[i]], None, given.scales[i])
        for i in range(len(members)) if wants_dS[i] and i not in both
    }  # fmt: skip
    for i in range(len(members)):
        if wants_dB[i] and i not in both:
            found.Bs[i] = _scaled_product(dys[i].t(), S[members[i].code], given.scales[i])
    together = [[each[i] for i in both] for each in (dys, given.Bs, [S[each.code] for each in members], given.scales)]
    if len(both) > 1:
        ours, theirs = torch.ops.lrcompile_kernels.group_gradients(*together)
    else:
        each = [torch.ops.lrcompile_kernels.factor_gradients(*one) for one in zip(*together, strict=True)]
        ours, theirs = [dS for dS, _ in each], [dB for _, dB in each]
    parts.update(zip(both, ours, strict=True))
    for i, dB in zip(both, theirs, strict=True):
        found.Bs[i] = dB

    return [_added([parts[i] for i in wanted.group.readers(code) if i in parts]) for code in range(wanted.group.codes)]


def _of_A(wanted: Wanted, given: Operands, x: Any, dS: Sequence[Any], found: Operands) -> None:
    """dA = dSᵀ·x for all codes without dropout at once."""
    group = wanted.group
    trained = [code for code in range(group.codes) if wanted.dA_by_codes(code)]
    plain = [code for code in trained if not group.drops[code]]
    if plain:
        dtypes = {wanted.dtype(code) for code in plain}
        dtype = dtypes.pop() if len(dtypes) == 1 else x.dtype
        together = product(stack([dS[code] for code in plain], 1, BACKWARD).t(), x, dtype)
        for code, dA in zip(plain, together.split([dS[code].shape[1] for code in plain]), strict=True):
            found.As[code] = dA
    for code in trained:
        if group.drops[code]:
            dropped = _drop(x, given.seeds[code], group.drops[code])
            found.As[code] = product(dS[code].t(), dropped, wanted.dtype(code))


def _through_weights(wanted: Wanted, given: Operands, x: Any, dys: Sequence[Tensor], found: Operands) -> None:
    """dB = s·G·Aᵀ and dA = (sB)ᵀ·G of the members that form G = dyᵀ·x."""
    for i, (member, dy) in enumerate(zip(wanted.group.members, dys, strict=True)):
        if wanted.G(i):
            G = dy.t() @ x
            if wanted.B(i):
                found.Bs[i] = _scaled_product(G, given.As[member.code].t(), given.scales[i])
            if wanted.A(member.code):
                found.As[member.code] = _scaled_product(given.Bs[i].to(dy.dtype).t(), G, given.scales[i])


def _of_x(wanted: Wanted, given: Operands, Ms: Maybe, dS: Sequence[Any], dys: Sequence[Tensor]) -> Tensor:
    """dx = Σ dyᵢ·Wᵢ + dS·A: the products of one dtype in one buffer, those under dropout added to it."""
    group, dtype = wanted.group, dys[0].dtype
    xs: list[Tensor] = []
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for member, held, M, dy in zip(group.members, given.held, Ms, dys, strict=True):
        if isinstance(member.base, Quantized) and member.base.by_codes:
            others.append(member.base.gradient(held, dy))
            continue
        W = (member.base.matrix(held, member.base.computes_in(dtype), BACKWARD) if M is None else M).t()
        if W.dtype == dtype:
            xs, matrices = [*xs, dy], [*matrices, W]
        else:
            others.append((dy.to(W.dtype) @ W).to(dtype))
    acting = [code for code in range(group.codes) if group.acts(code)]
    plain = [code for code in acting if not group.drops[code]]
    if plain:
        xs = [*xs, stack([dS[code] for code in plain], 1, BACKWARD)]
        matrices = [*matrices, stack([given.As[code] for code in plain], 0, BACKWARD)]
    others += [
        _drop(product(dS[code], given.As[code]), given.seeds[code], group.drops[code])
        for code in acting
        if group.drops[code]
    ]
    dx = torch.ops.lrcompile_kernels.sum_of_products(xs, matrices, None) if xs else others.pop()
    for other in others:
        dx = dx + other
    return dx


def _drop(x: Tensor, seed: Tensor, p: float) -> Tensor:
    return torch.ops.lrcompile_kernels.drop(x, seed, p, dropout_ops.BACKWARD)


def _scaled_product(x: Tensor, M: Tensor, scale: Tensor | None) -> Tensor:
    """s·x·M, scaled in the wider of the two dtypes."""
    if scale is None:
        return x @ M
    return torch.ops.lrcompile_kernels.cast_product(x, M, torch.promote_types(x.dtype, scale.dtype), scale)
