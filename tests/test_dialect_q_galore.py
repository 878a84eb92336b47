"""Ops on codes: the values and gradients of what the codes stand for, and nothing but codes kept for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import lrcompile.dialect.q_galore  # noqa: F401  (registers the ops)
from lrcompile.int8.groups import dequantize_groups, quantize_groups

linear = torch.ops.lrcompile.int8_linear.default
project = torch.ops.lrcompile.project_gradient_int4.default
STORED = pytest.mark.parametrize("transposed", [False, True])


def held(transposed: bool) -> tuple[Any, Tensor]:
    """Groups of a 5 × 7 weight as it is stored, and the weight they stand for as `[out, in]`."""
    groups = quantize_groups(torch.randn((7, 5) if transposed else (5, 7)), 8, 16)
    W = dequantize_groups(groups, (7, 5) if transposed else (5, 7), 8, torch.float32)
    return groups, W.t() if transposed else W


def run(x: Tensor, groups: Any, b: Tensor | None, transposed: bool) -> Tensor:
    return linear(x, *groups, b, *((7, 5) if transposed else (5, 7)), transposed, torch.float32)


@STORED
@pytest.mark.parametrize("biased", [False, True])
def test_values_and_gradients_are_those_of_the_dequantized_weight(transposed, biased):
    groups, W = held(transposed)
    x = torch.randn(2, 3, 7, requires_grad=True)
    b = torch.randn(5, requires_grad=True) if biased else None
    inputs = [t for t in (x, b) if t is not None]
    ours, theirs = run(x, groups, b, transposed), F.linear(x, W, b)
    torch.testing.assert_close(ours, theirs)
    dy = torch.randn_like(ours)
    for a, c in zip(torch.autograd.grad(ours, inputs, dy), torch.autograd.grad(theirs, inputs, dy), strict=True):
        torch.testing.assert_close(a, c)


@STORED
def test_compiled_and_checkpointed_it_is_eager(transposed):
    groups, _ = held(transposed)
    x, b = torch.randn(3, 7, requires_grad=True), torch.randn(5, requires_grad=True)

    def f(x: Tensor, b: Tensor) -> Tensor:
        return run(x, groups, b, transposed).tanh()

    def gradients(run_it: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(run_it(x, b).square().sum(), (x, b))

    torch.compiler.reset()
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    for other in (compiled, lambda *a: checkpoint(f, *a, use_reentrant=False)):
        for a, c in zip(gradients(other), gradients(f), strict=True):
            torch.testing.assert_close(a, c)


def test_only_codes_are_kept_for_the_backward_pass():
    groups, _ = held(False)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        run(torch.randn(9, 7, requires_grad=True), groups, None, False)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in groups}


def test_under_autocast_it_answers_in_the_lower_dtype_and_its_gradient_in_that_of_x():
    groups, W = held(False)
    x = torch.randn(4, 7, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = run(x, groups, None, False), F.linear(x, W)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    y.float().square().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize(("inside", "out"), [(7, 11), (11, 5)])
def test_a_projection_in_4_bits_projects_as_what_it_stands_for(inside, out):
    right = out >= inside
    shape = (3, inside) if right else (out, 3)
    groups = quantize_groups(torch.randn(shape), 4, 8)
    P = dequantize_groups(groups, shape, 4, torch.float32)
    Z = torch.zeros((out, 3) if right else (3, inside), requires_grad=True)
    x, W, dy = torch.randn(4, inside, requires_grad=True), torch.randn(out, inside), torch.randn(4, out)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    y = x @ W.t()
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = project(y, x, Z, *groups, right)
    dx, dZ = torch.autograd.grad(result, (x, Z), dy)
    G = dy.t() @ x.detach()
    torch.testing.assert_close(dZ, G @ P.t() if right else P.t() @ G)
    assert torch.equal(dx, dy @ W)
    kept = [t for t in saved if t.data_ptr() not in {g.data_ptr() for g in groups}]
    assert [tuple(t.shape) for t in kept] == [(4, 3) if right else (4, inside)]
