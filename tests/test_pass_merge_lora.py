"""Folding in a captured program: W' = round(W + Σ s·B·A), the graph without its adapters computes the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.export import Dim

from lrcompile import dialect as dialect  # registers torch.ops.lrcompile
from lrcompile.deployment.capture import capture
from lrcompile.passes.base import Program
from lrcompile.passes.merge_lora import MergeLora
from lrcompile.passes.nodes import LORA

lora, lookup = torch.ops.lrcompile.lora, torch.ops.lrcompile.lora_embedding
IN, OUT, RANK = 5, 7, 3


class Pair(nn.Module):
    def __init__(self, in_features: int = IN, out_features: int = OUT, dtype: torch.dtype = torch.float64):
        super().__init__()
        self.A = nn.Parameter(torch.randn(RANK, in_features, dtype=dtype))
        self.B = nn.Parameter(torch.randn(out_features, RANK, dtype=dtype))
        self.register_buffer("scale", torch.tensor(0.7), persistent=False)

    def forward(self, y, x):
        return lora(y, x, self.A, self.B, self.scale, 0.0)


class Net(nn.Module):
    """Holds a weight and pairs; `body` says how they are used."""

    def __init__(self, body, **shapes):
        super().__init__()
        torch.manual_seed(0)
        self.body = body
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(*shape, dtype=torch.float64)))
        self.one, self.two = Pair(), Pair()

    def forward(self, x):
        return self.body(self, x)


def _merged(exported: torch.export.ExportedProgram, net: nn.Module) -> tuple[Program, dict[str, str]]:
    """The program after the pass, and by site why an adapter was kept."""
    program = Program(exported, net)
    result = MergeLora().apply(program)
    assert not MergeLora().apply(program).modified, "the pass is not idempotent"
    return program, {refusal.node: refusal.reason for refusal in result.refusals}


def _fold(net: nn.Module, *inputs: torch.Tensor) -> tuple[Program, dict[str, str], torch.Tensor, torch.Tensor]:
    free = tuple({axis: Dim.DYNAMIC for axis in range(x.dim() - 1)} for x in inputs)
    with torch.no_grad():
        before = net(*inputs)
    program, kept = _merged(capture(net, inputs, free).program, net)
    for weight in program.pending.values():
        assert weight().dtype == weight.dtype
        assert weight().shape == weight.shape
    left = [node for node in program.exported.graph.nodes if node.target is LORA]
    assert bool(left) == bool(kept)
    with torch.no_grad():
        return program, kept, before, program.module()(*inputs)


def _apply_to(net, pair, x):
    return pair(F.linear(x, net.W), x)


X = torch.randn(4, 6, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
BODIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "linear": (lambda net, x: net.one(F.linear(x, net.W), x), {"W": (OUT, IN)}),
    "linear with bias": (lambda net, x: net.one(F.linear(x, net.W, net.b), x), {"W": (OUT, IN), "b": (OUT,)}),
    "matmul": (lambda net, x: net.one(x @ net.W, x), {"W": (IN, OUT)}),
    "matmul of a transpose": (lambda net, x: net.one(x @ net.W.t(), x), {"W": (OUT, IN)}),
    "addmm in two dimensions": (
        lambda net, x: net.one(torch.addmm(net.b, x.view(-1, IN), net.W).view(*x.shape[:-1], OUT), x),
        {"W": (IN, OUT), "b": (OUT,)},
    ),
    "stacked adapters": (lambda net, x: net.two(net.one(F.linear(x, net.W), x), x), {"W": (OUT, IN)}),
    "used twice alike": (
        lambda net, x: net.one(F.linear(x, net.W), x) + _apply_to(net, net.one, -2 * x).relu(),
        {"W": (OUT, IN)},
    ),
    "one part of a packed weight": (
        lambda net, x: net.one(F.linear(x, net.W[:OUT]), x) * F.linear(x, net.W[OUT:]),
        {"W": (2 * OUT, IN)},
    ),
    "both parts, each its own": (
        lambda net, x: net.one(F.linear(x, net.W[:OUT]), x) * net.two(F.linear(x, net.W[OUT:]), x),
        {"W": (2 * OUT, IN)},
    ),
}


@pytest.mark.parametrize("name", BODIES)
def test_folding_keeps_the_function(name):
    body, shapes = BODIES[name]
    program, kept, before, after = _fold(Net(body, **shapes), X)
    assert not kept
    assert list(program.pending) == ["W"]
    assert (before - after).abs().max() <= 1e-13 * before.abs().max()


SHARED: dict[str, tuple[Any, dict[str, Any]]] = {
    "adapted once, plain once": (
        lambda net, x: net.one(F.linear(x, net.W), x) * F.linear(x.relu(), net.W),
        {"W": (OUT, IN)},
    ),
    "adapted by two adapters": (
        lambda net, x: net.one(F.linear(x, net.W), x) * _apply_to(net, net.two, x.relu()),
        {"W": (OUT, IN)},
    ),
    "read in another way": (lambda net, x: net.one(F.linear(x, net.W), x) + net.W.sum(), {"W": (OUT, IN)}),
    "overlapping parts": (
        lambda net, x: net.one(F.linear(x, net.W[:OUT]), x) * F.linear(x, net.W[1 : OUT + 1]),
        {"W": (2 * OUT, IN)},
    ),
}


@pytest.mark.parametrize("name", SHARED)
def test_other_uses_of_the_weight_keep_its_numbers(name):
    body, shapes = SHARED[name]
    program, kept, before, after = _fold(Net(body, **shapes), X)
    assert not kept
    assert "W" not in program.pending  # it stays as it is; the adapted uses got copies
    assert (before - after).abs().max() <= 1e-13 * before.abs().max()


KEPT: dict[str, Any] = {
    "the base output is used a second time": lambda net, x: (lambda y: net.one(y, x) + y)(F.linear(x, net.W)),
    "its weight is computed": lambda net, x: net.one(F.linear(x, net.W * 2), x),
    "it reads another input": lambda net, x: net.one(F.linear(x, net.W), x.relu()),
    "not from a product": lambda net, x: net.one(F.linear(x, net.W).relu(), x),
}


@pytest.mark.parametrize("reason", KEPT)
def test_what_cannot_be_folded_is_kept_and_says_why(reason):
    program, kept, before, after = _fold(Net(KEPT[reason], W=(OUT, IN)), X)
    assert list(kept) == ["one"]
    assert reason in kept["one"]
    assert not program.pending
    assert torch.equal(before, after)


def test_an_embedding_folds_by_row():
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.W = nn.Parameter(torch.randn(11, OUT))
            self.A, self.B = nn.Parameter(torch.randn(RANK, 11)), nn.Parameter(torch.randn(OUT, RANK))
            self.register_buffer("scale", torch.tensor(0.5), persistent=False)

        def forward(self, ids):
            return lookup(F.embedding(ids, self.W, 3), ids, self.A, self.B, self.scale, 3)

    program, _, before, after = _fold(Table(), torch.arange(22).view(2, 11) % 11)
    assert list(program.pending) == ["W"]
    # one product and one sum of rank terms in each of two orders
    assert (before - after).abs().max() <= 2 * (RANK + 2) * 2**-24 * 40


@settings(deadline=None, max_examples=20, derandomize=True)
@given(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.integers(0, 2**16))
def test_a_folded_weight_is_the_float32_sum_rounded_once(dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    net = nn.Linear(IN, OUT, bias=False)
    pair: Any = Pair(dtype=torch.float32)
    for parameter in (net.weight, pair.A, pair.B):
        parameter.data = torch.randn(parameter.shape, generator=generator)
    net.to(dtype)
    holder: Any = nn.ModuleDict({"net": net, "pair": pair})
    holder.forward = lambda x: pair(net(x), x)
    program, _ = _merged(capture(holder, (torch.ones(2, IN, dtype=dtype),)).program, holder)
    (weight,) = program.pending.values()
    expected = net.weight.float() + pair.scale * (pair.B @ pair.A)
    assert torch.equal(weight(), expected.to(dtype))


def test_nothing_is_computed_before_it_is_asked_for():
    body, shapes = BODIES["linear"]
    net: Any = Net(body, **shapes)
    program, _ = _merged(capture(net, (X,), ({0: Dim.DYNAMIC},)).program, net)
    (weight,) = program.pending.values()
    assert program.exported.state_dict["W"].data_ptr() == net.W.data_ptr()
    assert torch.equal(net.W, weight.base())
    assert weight().data_ptr() != net.W.data_ptr()
