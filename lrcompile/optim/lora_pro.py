"""LoRA-Pro (arXiv 2407.18242): the gradients of A and B whose step of BA is the nearest to that of W."""

from __future__ import annotations

import torch
from torch import Tensor

from lrcompile.optim.grams import gram, inverse, wide
from lrcompile.optim.rule import Rule, Step


class NearestStep(Rule):
    """g̃_A = s⁻²(BᵀB)⁻¹g_A + XA,  g̃_B = s⁻²(I − B(BᵀB)⁻¹Bᵀ)g_B(AAᵀ)⁻¹ − BX, which the optimizer takes for gradients.

    s(B·g̃_A + g̃_B·A) is then the projection of the weight's gradient on what a step of A and B can make, for every X;
    X `[rank, rank]` is the one that keeps both gradients nearest to LoRA's own, the solution of
    BᵀB·X + X·AAᵀ = −s⁻²(BᵀB)⁻¹g_A·Aᵀ. Gram matrices carry 1e-8·I, as in the authors' code, and are float64; so at
    B = 0, where g_A = 0, the step is g̃_A = 0, g̃_B = s⁻²g_B(AAᵀ)⁻¹. This is the paper's efficient form, whose moments
    are those of the optimizer on A and B; a weight decay there acts on A and B. While B is small g̃_A is of size
    1/‖B‖: use an adaptive optimizer. Clip gradients before the step, as ever: what is clipped are those of LoRA.
    """

    def before_step(self, step: Step) -> None:
        for adapter in self.pairs():
            A, B = adapter.A, adapter.B
            if A.grad is not None and B.grad is not None:
                exact = wide(A.grad)
                of = [tensor.to(exact) for tensor in (A, B, A.grad, B.grad, adapter.scale)]
                for grad, nearest in zip((A.grad, B.grad), nearest_step(*of), strict=True):
                    grad.copy_(nearest)


def nearest_step(A: Tensor, B: Tensor, grad_A: Tensor, grad_B: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """g̃_A `[..., rank, in]` and g̃_B `[..., out, rank]`."""
    right, left = gram(A), gram(B.mT)
    left_inverse = inverse(left).to(A.dtype)
    step_A = left_inverse @ grad_A / scale**2
    X = solve_sylvester(left, right, -(step_A @ A.mT).double()).to(A.dtype)
    outside = grad_B - B @ (left_inverse @ (B.mT @ grad_B))
    return step_A + X @ A, outside @ inverse(right).to(A.dtype) / scale**2 - B @ X


def solve_sylvester(left: Tensor, right: Tensor, constant: Tensor) -> Tensor:
    """X with L·X + X·R = C, for symmetric positive definite L and R `[..., rank, rank]`."""
    (p, P), (q, Q) = torch.linalg.eigh(left), torch.linalg.eigh(right)
    return P @ ((P.mT @ constant @ Q) / (p.unsqueeze(-1) + q.unsqueeze(-2))) @ Q.mT
