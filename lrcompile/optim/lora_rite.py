"""LoRA-RITE (arXiv 2410.20625): an optimizer to which (A, B) and (RA, BR⁻¹) are the same."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from lrcompile.errors import AdapterError
from lrcompile.optim.rule import Rule, Step

_WEAKEST = 1e-3
"""Of the largest magnitude in a factor: below it the other factor does not follow."""


class LoraRite(torch.optim.Optimizer):
    """B ← B − η·M_B·R_A⁻ᵀ and Aᵀ ← Aᵀ − η·M_A·R_B⁻ᵀ, where Aᵀ = Q_A·R_A, B = Q_B·R_B and, for B (A likewise),

        G_B = g_B·R_A⁻¹                        the gradient as it would be, were Aᵀ orthonormal
        V_B ← β₂·P·V_B·Pᵀ + (1 − β₂)·G_BᵀG_B/out     second moment `[rank, rank]`, P = Q_Aᵀ·Q_A(before)
        M_B ← β₁·M_B·Pᵀ + (1 − β₁)·G_B·V_B^(−1/2)    first moment `[out, rank]`

    so moments live in the basis of the other factor and move with it, and the trajectory of BA does not depend on how
    A and B share it. Betas are those of Adam, corrected for bias; V^(−1/2) is 1/(√λ + ε) on eigenvalues λ ≥ 0; the G of
    all pairs together are clipped to `max_norm` (None: not). `escape` adds to λ what projections lost of V so far, as
    in the paper's algorithm; off, as in the authors' recipe for PyTorch. R⁻¹ is a pseudo-inverse: at B = 0 only B
    moves. A direction of R below 1/1000 of the largest counts as zero, and rounding in V is not scaled up: after a
    batch of fewer tokens than the rank B has directions that hold nothing but rounding, by whose inverse A would grow
    without bound (the authors' recipe does). What it says of (RA, BR⁻¹) so holds within that range of magnitudes.

    A group with `pairs=True` holds A `[..., rank, in]` and B `[..., out, rank]` of each pair one after the other
    (`lrcompile.optimizer` sees to it for `spec("lora-rite")`); other groups get AdamW. State is tensors in `state[p]`.
    Raises `AdapterError` without pairs, for pairs of unequal rank, and for factors in half precision, in which a basis
    cannot be kept.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        max_norm: float | None = 1.0,
        escape: bool = False,
    ):
        valid = lr >= 0 and eps > 0 and weight_decay >= 0 and all(0 <= beta < 1 for beta in betas)
        if not valid or (max_norm is not None and not max_norm > 0):
            raise AdapterError(
                f"LoraRite takes lr ≥ 0, betas in [0, 1), eps > 0, weight_decay ≥ 0 and max_norm > 0 or None, got"
                f" lr={lr}, betas={betas}, eps={eps}, weight_decay={weight_decay}, max_norm={max_norm}"
            )
        settings = {"betas": betas, "eps": eps, "weight_decay": weight_decay, "max_norm": max_norm, "escape": escape}
        super().__init__(params, {"lr": lr, **settings, "pairs": False})
        if not any(group["pairs"] for group in self.param_groups):
            raise AdapterError(
                "LoraRite got no pairs of factors: apply spec('lora-rite') and pass it to lrcompile.optimizer, or give"
                " groups of A, B, A, B, … with pairs=True"
            )
        for _, A, B in self._pairs():
            if A.dim() < 2 or A.dim() != B.dim() or A.shape[-2] != B.shape[-1]:
                shapes = f"{tuple(A.shape)} and {tuple(B.shape)}"
                raise AdapterError(f"a pair is A [..., rank, in] and B [..., out, rank], got {shapes}")
            if A.dtype not in (torch.float32, torch.float64) or A.dtype != B.dtype:
                raise AdapterError(f"LoraRite takes float32 or float64 factors, got {A.dtype}: set the spec's dtype")

    def _pairs(self) -> Iterator[tuple[dict[str, Any], Tensor, Tensor]]:
        for group in self.param_groups:
            if group["pairs"]:
                for A, B in zip(group["params"][0::2], group["params"][1::2], strict=True):
                    yield group, A, B

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of everything that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step_pairs()
        for group in self.param_groups:
            if not group["pairs"]:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        adamw(parameter, self.state[parameter], group)
        return loss

    def _step_pairs(self) -> None:
        sides = []
        for group, A, B in self._pairs():
            if A.grad is None or B.grad is None:
                continue
            first, second = Side(self.state[A], A.mT, A.grad.mT), Side(self.state[B], B, B.grad)
            first.meet(second)
            second.meet(first)
            sides += [(group, first), (group, second)]
        if not sides:
            return
        norm = torch.stack([side.grad.norm().to(sides[0][1].grad) for _, side in sides]).norm()
        for group, side in sides:
            limit = group["max_norm"]
            side.step(group, 1.0 if limit is None else (limit / norm.clamp(min=limit)).to(side.grad))


class Side:
    """One factor of a pair as a tall matrix `[..., n, rank]`, during one step."""

    def __init__(self, state: dict[str, Any], tall: Tensor, grad: Tensor):
        self.state, self.tall, self.grad = state, tall, grad
        self.basis, self.magnitude = torch.linalg.qr(tall)
        self.before: Tensor = state["basis"] if "basis" in state else torch.zeros_like(self.basis)

    def meet(self, other: Side) -> None:
        """Take the other factor's magnitude off the gradient; see how far its basis has turned."""
        self.unmagnify = torch.linalg.pinv(other.magnitude, rtol=_WEAKEST)
        self.turn = other.basis.mT @ other.before
        self.grad = self.grad @ self.unmagnify

    def step(self, group: dict[str, Any], clip: Tensor | float) -> None:
        state, grad = self.state, self.grad * clip
        if "step" not in state:
            rank = grad.shape[-1]
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["first"] = torch.zeros_like(grad)
            state["second"] = grad.new_zeros(*grad.shape[:-2], rank, rank)
            state["escaped"] = grad.new_zeros(grad.shape[:-2])
        state["step"] += 1
        beta1, beta2 = (unbiased(beta, float(state["step"])) for beta in group["betas"])
        turned = self.turn @ state["second"] @ self.turn.mT
        if group["escape"]:
            state["escaped"] = beta2 * (state["escaped"] + lost(state["second"], turned))
        state["second"] = beta2 * turned + (1 - beta2) * (grad.mT @ grad) / grad.shape[-2]
        update = grad @ inverse_root(state["second"], state["escaped"], group["eps"])
        state["first"] = beta1 * (state["first"] @ self.turn.mT) + (1 - beta1) * update
        state["basis"] = self.basis
        change = state["first"] @ self.unmagnify.mT + group["weight_decay"] * self.tall
        self.tall.sub_(group["lr"] * change)


def unbiased(beta: float, step: float) -> float:
    """β(1 − βᵗ⁻¹)/(1 − βᵗ): with it for β, an average that starts at zero needs no correction later."""
    return beta * (1 - beta ** (step - 1)) / (1 - beta**step)


def lost(before: Tensor, after: Tensor) -> Tensor:
    """How much of a second moment a projection took away, in the worst direction and at most in sum."""
    eigenvalues = torch.linalg.eigvalsh(before) - torch.linalg.eigvalsh(after)
    return torch.minimum(eigenvalues.amax(-1), eigenvalues.sum(-1)).clamp(min=0)


def inverse_root(second: Tensor, escaped: Tensor, eps: float) -> Tensor:
    values, vectors = torch.linalg.eigh(second)
    rounding = values.shape[-1] * torch.finfo(values.dtype).eps * values.amax(-1, keepdim=True).clamp(min=0)
    roots = 1 / ((values.maximum(rounding) + escaped.unsqueeze(-1)).sqrt() + eps)
    return (vectors * roots.unsqueeze(-2)) @ vectors.mT


def adamw(parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """p ← (1 − ηw)p − η·m̂/(√v̂ + ε), for what is no pair."""
    grad = parameter.grad
    assert grad is not None
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["first"], state["second"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    state["step"] += 1
    beta1, beta2 = (unbiased(beta, float(state["step"])) for beta in group["betas"])
    state["first"].lerp_(grad, 1 - beta1)
    state["second"].lerp_(grad.square(), 1 - beta2)
    parameter.mul_(1 - group["lr"] * group["weight_decay"])
    parameter.sub_(group["lr"] * state["first"] / (state["second"].sqrt() + group["eps"]))


class RiteOnly(Rule):
    """Gives `LoraRite` the pairs, and refuses another optimizer: this one is the method."""

    def check(self, cls: Callable[..., torch.optim.Optimizer]) -> None:
        made = cls.func if isinstance(cls, functools.partial) else cls
        if isinstance(made, type) and not issubclass(made, LoraRite):
            raise _other(made)

    def started(self, step: Step) -> None:
        if not isinstance(step.optimizer, LoraRite):
            raise _other(type(step.optimizer))

    def groups(self, groups: list[dict[str, Any]], lr: float) -> list[dict[str, Any]]:
        pairs = [(adapter.A, adapter.B) for adapter in self.pairs()]
        split = []
        for group in groups:
            held = {id(tensor) for tensor in group["params"]}
            factors = [factor for pair in pairs if held.issuperset(map(id, pair)) for factor in pair]
            taken = set(map(id, factors))
            others = [tensor for tensor in group["params"] if id(tensor) not in taken]
            split += [{**group, "params": factors, "pairs": True}] if factors else []
            split += [{**group, "params": others}] if others else []
        return split


def _other(cls: type) -> AdapterError:
    return AdapterError(
        f"lora-rite is an optimizer: pass lrcompile.LoraRite instead of {cls.__name__} (spec('lora') takes any)"
    )
