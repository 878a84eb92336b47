"""The dialect's gains: rounded once where they run, the plain sum where they are captured or transformed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import lrcompile.dialect.gain  # noqa: F401 (registers the op)

GAIN = torch.ops.lrcompile.gain.default
KEPT = pytest.mark.parametrize("bias", [False, True])


def drawn(lead=(4,), out=5, dtype=torch.float64, of_gain=torch.float64, bias=False) -> tuple[Tensor, Tensor, Any]:
    torch.manual_seed(1)
    y = torch.randn(*lead, out, dtype=torch.float64).to(dtype).requires_grad_()
    g = (1 + 0.3 * torch.randn(out, dtype=torch.float64)).to(of_gain).requires_grad_()
    return y, g, torch.randn(out, dtype=torch.float64).to(dtype) if bias else None


def formula(y: Tensor, g: Tensor, kept: Tensor | None) -> Tensor:
    c = 0 if kept is None else kept.double()
    return y.double() + (g.double() - 1) * (y.double() - c)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    lead=st.lists(st.integers(0, 3), max_size=3).map(tuple),
    out=st.integers(1, 40),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    of_gain=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    bias=st.booleans(),
)
def test_it_is_the_formula_and_16_bits_are_rounded_once(lead, out, dtype, of_gain, bias):
    y, g, kept = drawn(lead, out, dtype, of_gain, bias)
    result, true = GAIN(y, g, kept), formula(y, g, kept)
    assert (result.dtype, result.shape) == (dtype, y.shape)
    size = y.double().abs() * g.double().abs() + (0 if kept is None else kept.double().abs() * (1 + g.double().abs()))
    if dtype.itemsize == 2:  # half a unit in the last place, and what float32 rounds before it
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        bound = torch.finfo(dtype).eps / 2 * true.abs() + 8 * torch.finfo(torch.float32).eps * size + smallest / 2
    else:
        bound = 4 * torch.finfo(dtype).eps * size
    assert bool(((result.double() - true).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@KEPT
def test_a_gain_of_one_leaves_the_bits_alone(dtype, bias):
    y, g, kept = drawn((64,), 33, dtype, bias=bias)
    assert torch.equal(GAIN(y, torch.ones_like(g), kept), y)


@KEPT
def test_first_second_and_forward_derivatives_are_those_of_the_formula(bias):
    y, g, kept = drawn(bias=bias)
    assert torch.autograd.gradcheck(lambda y, g: GAIN(y, g, kept), (y, g), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda y, g: GAIN(y, g, kept).square(), (y, g))


@KEPT
@pytest.mark.parametrize("lead", [(0,), (2, 0, 3)])
def test_no_rows_have_no_gradient_and_give_none(lead, bias):
    y, g, kept = drawn(lead, bias=bias)
    dy, dg = torch.autograd.grad(GAIN(y, g, kept).sum(), (y, g))
    assert dy.shape == y.shape
    assert torch.equal(dg, torch.zeros_like(g))


def test_what_is_kept_may_train_or_be_as_large_as_y():
    y, g, kept = drawn(bias=True)
    assert torch.autograd.gradcheck(GAIN, (y, g, kept.requires_grad_()))
    assert torch.autograd.gradcheck(GAIN, (y, g, torch.randn(4, 5, dtype=torch.float64, requires_grad=True)))


@KEPT
def test_the_gradient_of_the_gain_beside_a_bfloat16_y_has_the_digits_of_float32(bias):
    y, g, kept = drawn((400,), 7, torch.bfloat16, torch.float32, bias)
    upstream = torch.randn(400, 7).bfloat16()
    (dg,) = torch.autograd.grad(GAIN(y, g, kept), g, upstream)
    terms = upstream.double() * (y.double() - (0 if kept is None else kept.double()))
    assert dg.dtype == torch.float32
    assert bool(((dg.double() - terms.sum(0)).abs() <= 400**0.5 * 4 * 2**-24 * terms.abs().sum(0)).all())


@KEPT
def test_every_torch_func_transform_agrees(bias):
    y, g, kept = drawn(bias=bias)

    def loss(y: Tensor, g: Tensor) -> Tensor:
        return GAIN(y, g, kept).square().sum()

    dy, dg = torch.autograd.grad(loss(y, g), (y, g))
    each = torch.func.vmap(torch.func.grad(loss, argnums=1), in_dims=(0, None))(y.detach(), g.detach())
    assert_close(each.sum(0), dg)
    assert_close(torch.func.grad(loss)(y.detach(), g.detach()), dy)
    stack = torch.stack([g.detach(), 2 * g.detach()])
    out = torch.func.vmap(lambda g: GAIN(y.detach(), g, kept))(stack)
    assert_close(out, torch.stack([formula(y, row, kept) for row in stack]).detach())


class Made(TorchDispatchMode):
    """How many tensors as large as y each operation made anew."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.counts = numel, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(one, Tensor) and not func.is_view and one.numel() == self.numel:
                self.counts[func._schema.name.removeprefix("aten::")] += 1
        return out


@KEPT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_makes_the_result_and_the_gradient_and_keeps_y_alone(dtype, bias):
    y, g, kept = drawn((6, 10), 33, dtype, torch.float32, bias)
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    upstream = torch.randn(6, 10, 33).to(dtype)
    with Made(y.numel()) as made, saved_tensors_hooks(pack, lambda tensor: tensor):
        torch.autograd.grad(GAIN(y, g, kept), (y, g), upstream)
    assert made.counts == {"native_batch_norm": 1, "native_batch_norm_backward": 1}
    assert [size for size in saved.values() if size > 33] == [y.numel()]


@KEPT
def test_a_captured_graph_holds_one_node_that_decomposes_into_the_sum(bias):
    y, g, kept = drawn(dtype=torch.float32, of_gain=torch.float32, bias=bias)

    class Net(nn.Module):
        def forward(self, y: Tensor, g: Tensor) -> Tensor:
            return GAIN(y, g, kept)

    program = torch.export.export(Net(), (y.detach(), g.detach()))
    assert [n.target for n in program.graph.nodes if n.op == "call_function"].count(GAIN) == 1
    plain = program.run_decompositions()
    names = {str(n.target) for n in plain.graph.nodes if n.op == "call_function"}
    assert not any("lrcompile" in name or "norm" in name for name in names)
    assert_close(plain.module()(y.detach(), g.detach()), GAIN(y, g, kept).detach())
