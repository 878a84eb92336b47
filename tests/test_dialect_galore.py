"""project_gradient: nothing forward, the projected gradient of the weight backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lrcompile.dialect.galore import project_gradient as body

op = torch.ops.lrcompile.project_gradient.default
SIDES = pytest.mark.parametrize(("inside", "out"), [(7, 11), (11, 5), (6, 6)])


def given_map(
    inside: int, out: int, rank: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """W, and Z and P of the side that its shape says."""
    right = out >= inside
    W = torch.randn(out, inside, dtype=dtype)
    P = torch.randn((rank, inside) if right else (out, rank), dtype=dtype)
    return W, torch.zeros((out, rank) if right else (rank, inside), dtype=dtype, requires_grad=True), P, right


@settings(deadline=None, max_examples=20, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.lists(st.integers(0, 4), max_size=3))
def test_the_gradient_of_z_is_the_weights_own_projected(inside, out, rank, lead):
    W, Z, P, right = given_map(inside, out, rank)
    W.requires_grad_()
    x = torch.randn(*lead, inside, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(*lead, out, dtype=torch.float64)
    G, dx = torch.autograd.grad(x @ W.t(), (W, x), dy)
    dZ, dx_beside = torch.autograd.grad(op(x @ W.detach().t(), x, Z, P, right), (Z, x), dy)
    torch.testing.assert_close(dZ, G @ P.t() if right else P.t() @ G, rtol=1e-12, atol=1e-12)
    assert torch.equal(dx, dx_beside)


@SIDES
def test_forward_is_y_itself_without_a_copy_or_a_product(inside, out):
    _, Z, P, right = given_map(inside, out, 3)
    y, x = torch.randn(4, out, dtype=torch.float64), torch.randn(4, inside, dtype=torch.float64)
    result = op(y, x, Z, P, right)
    assert torch.equal(result, y)
    assert result.data_ptr() == y.data_ptr()


@SIDES
def test_an_activation_may_work_in_place_on_what_follows(inside, out):
    W, Z, P, right = given_map(inside, out, 3)
    x = torch.randn(5, inside, dtype=torch.float64)
    gradients = []
    for act in (torch.relu, torch.relu_):
        (dZ,) = torch.autograd.grad(act(op(x @ W.t(), x, Z, P, right)).square().sum(), Z)
        gradients.append(dZ)
    assert torch.equal(*gradients)


@pytest.mark.parametrize(("inside", "out", "kept"), [(7, 11, 3), (11, 5, 11)])
def test_the_right_side_keeps_rank_numbers_a_token_the_left_side_the_input(inside, out, kept):
    W, Z, P, right = given_map(inside, out, 3)
    x = torch.randn(2, 5, inside, dtype=torch.float64)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    y = x @ W.t()
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        op(y, x, Z, P, right)
    weights = {P.data_ptr(), Z.data_ptr()}
    sizes = [tensor.nbytes for tensor in saved if tensor.data_ptr() not in weights]
    assert sizes == [2 * 5 * kept * 8]


@SIDES
def test_compiled_and_checkpointed_gradients_are_eagers(inside, out):
    W, Z, P, right = given_map(inside, out, 3)
    x = torch.randn(4, inside, dtype=torch.float64, requires_grad=True)

    def f(x: Tensor, Z: Tensor) -> Tensor:
        return op(x @ W.t(), x, Z, P, right).tanh()

    def gradients(run: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(x, Z).square().sum(), (x, Z))

    expected = gradients(f)
    torch.compiler.reset()
    runs = [torch.compile(f, backend="aot_eager", fullgraph=True)]
    runs += [lambda *a, reentrant=r: checkpoint(f, *a, use_reentrant=reentrant) for r in (False, True)]
    for run in runs[:2]:
        for a, b in zip(gradients(run), expected, strict=True):
            assert torch.equal(a, b)
    runs[2](x, Z).square().sum().backward()  # reentrant checkpoints take no torch.autograd.grad
    assert Z.grad is not None
    assert torch.equal(Z.grad, expected[1])


def test_the_gradient_has_the_dtype_of_z_under_autocast_and_on_a_half_precision_map():
    _, Z, P, right = given_map(11, 5, 3, torch.float32)
    W = torch.randn(5, 11)
    x = torch.randn(6, 11)
    (exact,) = torch.autograd.grad(op(x @ W.t(), x, Z, P, right).square().sum(), Z)
    with torch.autocast("cpu", torch.bfloat16):
        (mixed,) = torch.autograd.grad(op(torch.nn.functional.linear(x, W), x, Z, P, right).float().square().sum(), Z)
    half = x.bfloat16()
    (low,) = torch.autograd.grad(op(half @ W.bfloat16().t(), half, Z, P, right).float().square().sum(), Z)
    for gradient in (mixed, low):
        assert gradient.dtype == torch.float32
        assert (gradient - exact).norm() < 6 * 2**-8 * exact.norm()  # six roundings to bfloat16 on the path


def test_a_gradient_of_the_gradient_is_refused_not_wrong():
    W, Z, P, right = given_map(7, 11, 3)
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(op(x @ W.t(), x, Z, P, right).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.square().sum().backward()


def test_the_op_is_composite_so_that_it_never_loses_its_gradient():
    keys = ("CPU", "CUDA", "CompositeExplicitAutograd")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd")
    assert not any(torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), key) for key in keys)
    assert body.__doc__
