"""Linear maps of one input, each with low-rank factors beside it: one forward and one backward for all of them.

    yᵢ = x·Wᵢᵀ + bᵢ + Sᵢ·(sᵢBᵢ)ᵀ,   S = x·[A₁; …; Aₙ]ᵀ
    dx = Σ dyᵢ·Wᵢ + dS·[A₁; …; Aₙ],   dSᵢ = dyᵢ·(sᵢBᵢ),   dBᵢ = sᵢ·dyᵢᵀ·Sᵢ,   dAᵢ = dSᵢᵀ·x

x is read once for S and once for dA; S is kept and dS formed once, the least that trains both factors: 6Tr(i + o)
beside the 4Tio of the frozen maps. Only what a gradient needs is saved: S for B, x for A, nothing for frozen factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lrcompile.kernels.lora_group import ops as ops  # registers the leaf ops
from lrcompile.lowered.bases import BACKWARD, FORWARD, Base, Dense

Role = Literal["pair", "right", "left"]
"""pair: B·A acts beside W. right, left: nothing acts; the factor that trains receives the gradient of W projected by
the other one, which is A (right, B trains) or B (left, A trains)."""


@dataclass(frozen=True)
class Member:
    """One map of a group."""

    base: Base
    code: int
    """Which of the group's A it reads: maps may share one."""
    role: Role = "pair"


@dataclass(frozen=True)
class AdaptedGroup:
    """Callable: x `[..., in]` and the flat tensors of `operands` to the tuple of yᵢ `[..., outᵢ]`.

    Computes in x's dtype, or autocast's where that is on; factors of another dtype are cast, and their gradients cast
    back. The codes of all `pair` members come first, then those of `right`, then of `left`.
    """

    members: tuple[Member, ...]
    codes: int

    __name__ = "adapted_group"

    def __post_init__(self) -> None:
        order = {"pair": 0, "right": 1, "left": 2}
        ranked = sorted({(each.code, order[each.role]) for each in self.members})
        if [code for code, _ in ranked] != list(range(self.codes)) or ranked != sorted(
            ranked, key=lambda each: each[1]
        ):
            raise ValueError(f"the codes of a group are 0…{self.codes - 1}, each of one role, pairs first: {ranked}")

    def operands(
        self,
        held: Sequence[Sequence[Any]],
        biases: Sequence[Any],
        Bs: Sequence[Any],
        scales: Sequence[Any],
        As: Sequence[Any],
    ) -> tuple[Any, ...]:
        """The flat operands after x: those of each member and, of A, those of each code."""
        bases = [each for tensors in held for each in tensors]
        return (*bases, *biases, *Bs, *scales, *As)

    def __call__(self, x: Tensor, *operands: Tensor | None) -> tuple[Tensor, ...]:
        kind = x.device.type
        casts = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
        dtype = torch.get_autocast_dtype(kind) if casts else x.dtype
        with torch.autocast(kind, enabled=False) if casts else nullcontext():
            rows = x.to(dtype).reshape(-1, x.shape[-1])
            ys = _Group.apply(self, rows, *operands)
        return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in ys)

    def split(self, operands: Sequence[Any]) -> _Operands:
        left = list(operands)

        def take(count: int) -> list[Any]:
            taken, left[:count] = left[:count], []
            return taken

        count = len(self.members)
        held = [take(each.base.size) for each in self.members]
        return _Operands(held, take(count), take(count), take(count), take(self.codes))

    def roles(self) -> list[Role]:
        """Of each code."""
        found = {each.code: each.role for each in self.members}
        return [found[code] for code in range(self.codes)]


@dataclass
class _Operands:
    held: list[list[Any]]
    biases: list[Any]
    Bs: list[Any]
    scales: list[Any]
    As: list[Any]

    def flat(self) -> list[Any]:
        return [*(each for held in self.held for each in held), *self.biases, *self.Bs, *self.scales, *self.As]


class _Group(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: AdaptedGroup, x: Tensor, *operands: Any) -> tuple[Tensor, ...]:
        given, wants = group.split(operands), group.split(ctx.needs_input_grad[2:])
        seen = [code for code, role in enumerate(group.roles()) if role != "left"]
        S: dict[int, Tensor] = {}
        if seen:
            As = [given.As[code].to(x.dtype) for code in seen]
            S = dict(zip(seen, (x @ _stack(As).t()).split([A.shape[0] for A in As], 1), strict=True))
        ys = _products(group, given, x, S)

        ctx.group, ctx.wants, ctx.wants_x = group, wants, ctx.needs_input_grad[1]
        ctx.dtypes = _Operands([], *([None if t is None else t.dtype for t in ts] for ts in _vectors(given)))
        trained = {each.code for each, wanted in zip(group.members, wants.Bs, strict=True) if wanted}
        kept = _Operands(
            given.held if ctx.wants_x else [[None] * len(held) for held in given.held],
            [None] * len(given.biases),
            given.Bs,
            given.scales,
            given.As if ctx.wants_x else [None] * group.codes,
        )
        codes = [S.get(code) if code in trained else None for code in range(group.codes)]
        ctx.save_for_backward(x if any(wants.As) else None, *codes, *kept.flat())
        return ys

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Any, ...]:
        group, wants = ctx.group, ctx.wants
        x, *saved = ctx.saved_tensors
        S, given = saved[: group.codes], group.split(saved[group.codes :])
        dtype = dys[0].dtype
        dS, dBs = _through_factors(ctx, given, dys, S)

        dAs: list[Tensor | None] = [None] * group.codes
        found = [code for code in range(group.codes) if wants.As[code]]
        if found:
            parts = [dS[code] for code in found]
            together = _stack(parts, 1).t() @ x
            for code, dA in zip(found, together.split([part.shape[1] for part in parts]), strict=True):
                dAs[code] = dA.to(ctx.dtypes.As[code])

        dx = None
        if ctx.wants_x:
            each = zip(group.members, given.held, strict=True)
            matrices = [one.base.matrix(held, one.base.computes_in(dtype), BACKWARD).t() for one, held in each]
            acting = [code for code, role in enumerate(group.roles()) if role == "pair"]
            As = [given.As[code].to(dtype) for code in acting]
            dx = _summed(dys, matrices, [dS[code] for code in acting], As)
        dbiases = [dy.sum(0).to(ctx.dtypes.biases[i]) if wants.biases[i] else None for i, dy in enumerate(dys)]
        none: list[list[Any]] = [[None] * len(held) for held in given.held]
        return (None, dx, *_Operands(none, dbiases, dBs, [None] * len(dBs), dAs).flat())


def _vectors(operands: _Operands) -> tuple[list[Any], ...]:
    return operands.biases, operands.Bs, operands.scales, operands.As


def _through_factors(
    ctx: Any, given: _Operands, dys: Sequence[Tensor], S: Sequence[Tensor | None]
) -> tuple[list[Any], list[Tensor | None]]:
    """dS of each code and dB of each member, as far as a gradient needs them."""
    group, wants, dtype = ctx.group, ctx.wants, dys[0].dtype
    dS: list[Any] = [None] * group.codes
    dBs: list[Tensor | None] = []
    for i, (member, dy) in enumerate(zip(group.members, dys, strict=True)):
        code, scale = member.code, given.scales[i]
        B = _scaled(given.Bs[i], scale, dtype)
        part = dB = None
        wants_dS = wants.As[code] or (ctx.wants_x and member.role == "pair")
        if wants_dS and wants.Bs[i]:
            part, dB = torch.ops.lrcompile_kernels.factor_gradients(dy, B, S[code])
        elif wants_dS:
            part = dy @ B
        elif wants.Bs[i]:
            dB = dy.t() @ S[code]
        if part is not None:
            dS[code] = part if dS[code] is None else dS[code] + part
        dBs.append(None if dB is None else _scaled(dB, scale, ctx.dtypes.Bs[i]))
    return dS, dBs


def _scaled(factor: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """s·factor, multiplied in the wider of the two dtypes."""
    if scale is None:
        return factor.to(dtype)
    wide = torch.promote_types(factor.dtype, dtype)
    return (factor.to(wide) * scale.to(wide)).to(dtype)


def _stack(parts: Sequence[Any], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _products(group: AdaptedGroup, given: _Operands, x: Tensor, S: dict[int, Tensor]) -> tuple[Tensor, ...]:
    """Every yᵢ; several dense ones that all act are one operation."""
    dtype = x.dtype
    Bs = [_scaled(B, s, dtype) for B, s in zip(given.Bs, given.scales, strict=True)]
    each = list(zip(group.members, given.held, given.biases, Bs, strict=True))
    if len(each) > 1 and all(m.role == "pair" and isinstance(m.base, Dense) for m in group.members):
        return tuple(
            torch.ops.lrcompile_kernels.group_products(
                x,
                [member.base.matrix(held, dtype, FORWARD).t() for member, held, _, _ in each],
                [None if bias is None else bias.to(dtype) for bias in given.biases],
                [S[member.code] for member in group.members],
                Bs,
            )
        )
    ys = []
    for member, held, bias, B in each:
        computed = member.base.computes_in(dtype)
        xs, Ms = [x.to(computed)], [member.base.matrix(held, computed, FORWARD)]
        if member.role == "pair" and computed == dtype:
            xs, Ms = [*xs, S[member.code]], [*Ms, B.t()]
        bias = None if bias is None else bias.to(computed)
        y = torch.ops.lrcompile_kernels.sum_of_products(xs, Ms, bias).to(dtype)
        if member.role == "pair" and computed != dtype:
            y = torch.addmm(y, S[member.code], B.t())
        ys.append(y)
    return tuple(ys)


def _summed(dys: Sequence[Tensor], matrices: Sequence[Tensor], dS: Sequence[Tensor], As: Sequence[Tensor]) -> Tensor:
    """Σ dyᵢ·Wᵢ + dS·A, the products of one dtype in one buffer."""
    dtype = dys[0].dtype
    xs: list[Tensor] = []
    Ms: list[Tensor] = []
    others: list[Tensor] = []
    for dy, W in zip(dys, matrices, strict=True):
        if W.dtype == dtype:
            xs, Ms = [*xs, dy], [*Ms, W]
        else:
            others.append((dy.to(W.dtype) @ W).to(dtype))
    if As:
        xs, Ms = [*xs, _stack(dS, 1)], [*Ms, _stack(As)]
    dx = torch.ops.lrcompile_kernels.sum_of_products(xs, Ms, None) if xs else others.pop()
    for other in others:
        dx = dx + other
    return dx
