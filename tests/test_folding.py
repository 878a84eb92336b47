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
from lrcompile.capture import capture
from lrcompile.folding import LORA, Folded, fold_adapters

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


def _fold(net: nn.Module, *inputs: torch.Tensor) -> tuple[Folded, torch.Tensor, torch.Tensor]:
    free = tuple({axis: Dim.DYNAMIC for axis in range(x.dim() - 1)} for x in inputs)
    program = capture(net, inputs, free).program
    with torch.no_grad():
        before = net(*inputs)
    folded = fold_adapters(program)
    for name, recipe in folded.recipes.items():
        value = recipe()
        assert value.dtype == recipe.dtype
        assert value.shape == recipe.shape
        held = program.state_dict[name]
        program.state_dict[name] = nn.Parameter(value) if isinstance(held, nn.Parameter) else value
    left = [node for node in program.graph.nodes if node.target is LORA]
    assert bool(left) == bool(folded.kept)
    with torch.no_grad():
        return folded, before, program.run_decompositions().module()(*inputs)


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
    folded, before, after = _fold(Net(body, **shapes), X)
    assert not folded.kept
    assert list(folded.recipes) == ["W"]
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
    folded, before, after = _fold(Net(body, **shapes), X)
    assert not folded.kept
    assert "W" not in folded.recipes  # it stays as it is; the adapted uses got copies
    assert (before - after).abs().max() <= 1e-13 * before.abs().max()


KEPT: dict[str, Any] = {
    "the base output is used a second time": lambda net, x: (lambda y: net.one(y, x) + y)(F.linear(x, net.W)),
    "its weight is computed": lambda net, x: net.one(F.linear(x, net.W * 2), x),
    "it reads another input": lambda net, x: net.one(F.linear(x, net.W), x.relu()),
    "not from a product": lambda net, x: net.one(F.linear(x, net.W).relu(), x),
}


@pytest.mark.parametrize("reason", KEPT)
def test_what_cannot_be_folded_is_kept_and_says_why(reason):
    folded, before, after = _fold(Net(KEPT[reason], W=(OUT, IN)), X)
    assert list(folded.kept) == ["one"]
    assert reason in folded.kept["one"]
    assert not folded.recipes
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

    folded, before, after = _fold(Table(), torch.arange(22).view(2, 11) % 11)
    assert list(folded.recipes) == ["W"]
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
    folded = fold_adapters(capture(holder, (torch.ones(2, IN, dtype=dtype),)).program)
    (recipe,) = folded.recipes.values()
    expected = net.weight.float() + pair.scale * (pair.B @ pair.A)
    assert torch.equal(recipe(), expected.to(dtype))


def test_nothing_is_computed_before_it_is_asked_for():
    body, shapes = BODIES["linear"]
    net: Any = Net(body, **shapes)
    program = capture(net, (X,), ({0: Dim.DYNAMIC},)).program
    (recipe,) = fold_adapters(program).recipes.values()
    assert program.state_dict["W"].data_ptr() == net.W.data_ptr()
    assert torch.equal(net.W, recipe.base())
    assert recipe().data_ptr() != net.W.data_ptr()
