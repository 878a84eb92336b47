"""LoRA-Pro (methods_dense 3.1): the step of BA that its gradients make is the nearest to the full one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lrcompile
from lrcompile.optim.lora_pro import nearest_step, solve_sylvester

shapes = {
    "inside": st.integers(6, 19),
    "out": st.integers(6, 17),
    "rank": st.integers(1, 5),
    "seed": st.integers(0, 99),
}
scales = st.floats(0.1, 30)


def drawn(inside: int, out: int, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A, B, and the gradient of the weight."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return draw(rank, inside), draw(out, rank), draw(out, inside)


def step_of(A: Tensor, B: Tensor, G: Tensor, s: float) -> tuple[Tensor, Tensor]:
    return nearest_step(A, B, s * B.mT @ G, s * G @ A.mT, torch.tensor(s, dtype=torch.float64))


def tangent(A: Tensor, B: Tensor, dA: Tensor, dB: Tensor, s: float) -> Tensor:
    return s * (B @ dA + dB @ A)


def projected(A: Tensor, B: Tensor, G: Tensor) -> Tensor:
    """G on {B·dA + dB·A}: Π_B·G + (I − Π_B)·G·Π_A."""
    on_B, on_A = B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A
    return on_B @ G + (G - on_B @ G) @ on_A


def slack(A: Tensor, B: Tensor, G: Tensor) -> float:
    """What 1e-8 on each Gram matrix may change, twice over, and rounding by their condition."""
    small = min(float(torch.linalg.matrix_norm(F, -2)) for F in (A, B)) ** 2
    large = max(float(torch.linalg.matrix_norm(F, 2)) for F in (A, B)) ** 2
    return float(G.norm()) * (4e-8 / small + 1e-13 * large / small)


@settings(deadline=None, max_examples=20, derandomize=True)
@given(**shapes, s=scales)
def test_the_step_is_the_projection_of_the_full_gradient_on_the_tangent_space(inside, out, rank, seed, s):
    A, B, G = drawn(inside, out, rank, seed)
    step = tangent(A, B, *step_of(A, B, G, s), s)
    assert (step - projected(A, B, G)).norm() <= slack(A, B, G)


@settings(deadline=None, max_examples=20, derandomize=True)
@given(**shapes, s=scales)
def test_no_other_gradients_come_nearer(inside, out, rank, seed, s):
    A, B, G = drawn(inside, out, rank, seed)
    dA, dB = step_of(A, B, G, s)
    best = (tangent(A, B, dA, dB, s) - G).norm()
    g = torch.Generator().manual_seed(seed)
    for size in (1e-3, 1.0):
        A_too, B_too = (each + size * torch.randn(each.shape, generator=g) for each in (dA, dB))
        assert (tangent(A, B, A_too, B_too, s) - G).norm() >= best - slack(A, B, G)


@settings(deadline=None, max_examples=20, derandomize=True)
@given(**shapes, s=scales)
def test_X_changes_no_step_and_is_the_one_that_stays_nearest_to_loras_gradients(inside, out, rank, seed, s):
    A, B, G = drawn(inside, out, rank, seed)
    dA, dB = step_of(A, B, G, s)
    gA, gB = s * B.mT @ G, s * G @ A.mT
    distance = lambda X: (dA + X @ A - gA).norm() ** 2 + (dB - B @ X - gB).norm() ** 2  # noqa: E731
    X = torch.zeros(rank, rank, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(distance(X), X)
    scale = (gA.norm() + gB.norm() + dA.norm() + dB.norm()) * (A.norm() + B.norm())
    small = min(float(torch.linalg.matrix_norm(F, -2)) for F in (A, B)) ** 2
    assert slope.norm() <= scale * 1e-6 / small
    other = torch.randn(rank, rank, dtype=torch.float64)
    moved = tangent(A, B, dA + other @ A, dB - B @ other, s)
    torch.testing.assert_close(moved, tangent(A, B, dA, dB, s), rtol=1e-9, atol=1e-9 * s * float(A.norm() * B.norm()))
    assert distance(other) >= distance(torch.zeros_like(other)) - scale**2 * 1e-6 / small


@settings(deadline=None, max_examples=20, derandomize=True)
@given(rank=st.integers(1, 8), seed=st.integers(0, 99))
def test_the_sylvester_equation_is_solved(rank, seed):
    g = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(3, rank, rank, generator=g, dtype=torch.float64)  # noqa: E731
    left, right, constant = draw(), draw(), draw()
    left, right = left @ left.mT, right @ right.mT + torch.eye(rank)
    X = solve_sylvester(left, right, constant)
    torch.testing.assert_close(left @ X + X @ right, constant, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("zero", ["A", "B"])
def test_at_zero_the_step_is_still_the_projection(zero):
    A, B, G = drawn(11, 7, 3, 0)
    (A if zero == "A" else B).zero_()
    dA, dB = step_of(A, B, G, 2.0)
    assert not (dA if zero == "B" else dB).any()
    step = tangent(A, B, dA, dB, 2.0)
    torch.testing.assert_close(step, projected(A, B, G), rtol=0, atol=1e-7 * float(G.norm()))
    assert step.any()


def test_a_stack_of_maps_is_stepped_map_by_map():
    parts = [drawn(11, 7, 3, seed) for seed in range(4)]
    A, B, G = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
    dA, dB = step_of(A, B, G, 2.0)
    for index, part in enumerate(parts):
        alone = step_of(*part, 2.0)
        torch.testing.assert_close(dA[index], alone[0], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(dB[index], alone[1], rtol=1e-10, atol=1e-10)


def adapted() -> tuple[Any, Any]:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(11, 7)).double()
    lrcompile.apply(model, lrcompile.spec("lora-pro", rank=3, alpha=5, seed=0))
    return model, model[0].lrcompile_adapters["weight"]["default"]


def test_a_step_of_SGD_moves_the_weight_by_the_projected_gradient_to_first_order():
    model, adapter = adapted()
    with torch.no_grad():
        adapter.B.normal_()
    x, lr = torch.randn(50, 11, dtype=torch.float64), 1e-6
    before = adapter.delta(torch.float64)
    A, B = adapter.A.detach().clone(), adapter.B.detach().clone()
    optimizer = lrcompile.optimizer(model, torch.optim.SGD, lr=lr)
    y = model(x)
    y.retain_grad()
    y.square().mean().backward()
    G = y.grad.mT @ x
    optimizer.step()
    moved = (adapter.delta(torch.float64) - before) / -lr
    second_order = 10 * lr * float(G.norm())
    torch.testing.assert_close(moved, projected(A, B, G), rtol=0, atol=second_order + slack(A, B, G))


def test_it_starts_at_B_zero_and_learns():
    model, _ = adapted()
    optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=1e-2)
    x = torch.randn(50, 11, dtype=torch.float64)
    target = x @ torch.randn(11, 7, dtype=torch.float64)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.isfinite().all() for p in model.parameters())
