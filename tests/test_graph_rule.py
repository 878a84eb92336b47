"""After each product with an adapted weight, its live adapters: in traced and exported graphs, and back out again."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import lrcompile
import lrcompile.adapters  # registers the ops

LORA = torch.ops.lrcompile.lora.default
WIDTH = 5


def fill(model: Any) -> Any:
    """Factors that are not zero, each different."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lrcompile_adapters" in name:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)), dtype=torch.float64))
    return model


def shape(model) -> list:
    return [(node.op, node.target, len(node.users)) for node in model.graph.nodes]


def nodes(model) -> int:
    return sum(node.target is LORA for node in model.graph.nodes)


class Matrices(nn.Module):
    """Products with matrices of this module as `steps` say; `weights` replaces them (for the formula)."""

    def __init__(self, steps: list[tuple[str, int]], count: int = 3):
        super().__init__()
        self.steps = steps
        for i in range(count):
            weight = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
            setattr(self, f"w{i}", nn.Parameter(weight / WIDTH**0.5))

    def forward(self, x: Tensor) -> Tensor:
        for form, i in self.steps:
            w = getattr(self, f"w{i}")
            x = FORMS[form](x, w)
        return x


FORMS = {
    "linear": lambda x, w: F.linear(x, w),
    "linear-cast": lambda x, w: F.linear(x, w.to(torch.float64)),
    "transposed @": lambda x, w: x @ w.T,
    "mm": lambda x, w: torch.mm(x, w.t()),
    "matmul": lambda x, w: torch.matmul(x, w.transpose(0, 1)).relu(),
    "addmm": lambda x, w: torch.addmm(torch.ones(WIDTH, dtype=torch.float64), x, w.t()),
    "residual": lambda x, w: x + x.sin() @ w.mT,
}
STEPS = st.lists(st.tuples(st.sampled_from(sorted(FORMS)), st.integers(0, 2)), min_size=1, max_size=5)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(steps=STEPS, exported=st.booleans())
def test_a_random_graph_computes_the_formula_in_float64(steps, exported):
    """Also where one result is the next product's input, with the same weight or another."""
    plain: Any = Matrices(steps)
    x = torch.randn(4, WIDTH, dtype=torch.float64)
    used = sorted({f"w{i}" for _, i in steps})
    source = copy.deepcopy(plain)
    model: Any = torch.export.export(source, (x,)).module() if exported else fx.symbolic_trace(source)
    fill(lrcompile.apply(model, lrcompile.spec("lora", rank=2, alpha=3, targets=used)))
    assert nodes(model) == len(steps)
    for name in used:
        adapter = model.lrcompile_adapters[name]["default"]
        with torch.no_grad():
            getattr(plain, name).add_(adapter.B @ adapter.A, alpha=1.5)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-12)


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x):  # annotations as strings would keep fx from pickling the trace
        return (x @ self.w) @ self.w


def test_taking_out_and_putting_in_again_changes_nothing():
    model: Any = fx.symbolic_trace(Chain())
    before, x = shape(model), torch.randn(3, WIDTH)
    base = model(x)
    fill(lrcompile.apply(model, lrcompile.spec("lora", rank=2)))
    inside, adapted = shape(model), model(x)
    with lrcompile.disabled(model):
        assert shape(model) == before
        assert torch.equal(model(x), base)
    assert shape(model) == inside
    lrcompile.activate(model, [])
    assert torch.equal(model(x), base)
    lrcompile.activate(model, "default")
    assert torch.equal(model(x), adapted)
    lrcompile.remove(model)
    assert shape(model) == before


def test_several_adapters_act_with_their_weights_and_merge():
    model, x = fx.symbolic_trace(Chain()), torch.randn(3, WIDTH)
    lrcompile.apply(model, lrcompile.spec("lora", rank=2), name="a")
    fill(lrcompile.apply(model, lrcompile.spec("lora", rank=3), name="b"))
    lrcompile.activate(model, {"a": 0.5, "b": -1.0})
    assert nodes(model) == 4
    y = model(x)
    lrcompile.merge(model)
    assert nodes(model) == 0
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)
    lrcompile.unmerge(model)
    assert torch.equal(model(x), y)


def around(copier):
    """A model around a graph, copied while adapted, is a whole adapted model of its own."""
    model, x = nn.Sequential(fx.symbolic_trace(Chain())), torch.randn(3, WIDTH)
    base = model(x)
    fill(lrcompile.apply(model, lrcompile.spec("lora", rank=2)))
    other = copier(model)
    assert torch.equal(other(x), model(x))
    with lrcompile.disabled(other):
        assert torch.equal(other(x), base)
    assert torch.equal(other(x), model(x))
    assert nodes(other[0]) == nodes(model[0]) == 2


def test_a_copy_is_whole():
    around(copy.deepcopy)


def test_a_saved_and_loaded_model_is_whole():
    def through_file(model):
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    around(through_file)


def test_a_copied_graph_module_alone_computes_the_same_and_says_that_it_has_no_adapters_to_change():
    model, x = fx.symbolic_trace(Chain()), torch.randn(3, WIDTH)
    fill(lrcompile.apply(model, lrcompile.spec("lora", rank=2)))
    other = copy.deepcopy(model)
    assert torch.equal(other(x), model(x))
    with pytest.raises(lrcompile.AdapterError, match="no adapter"):
        lrcompile.merge(other)


class Called(nn.Module):
    """Submodules a traced graph calls, beside a matrix it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 7), nn.Linear(7, 3)
        self.w = nn.Parameter(torch.randn(7, 7))
        self.head = nn.Embedding(11, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        return self.down((self.up(self.head(ids)) @ self.w).tanh())


def same_factors(source: Any, target: Any) -> None:
    factors = {name: p for name, p in source.named_parameters() if "lrcompile_adapters" in name}
    theirs = {name: p for name, p in target.named_parameters() if "lrcompile_adapters" in name}
    assert set(factors) == set(theirs)
    with torch.no_grad():
        for name, p in factors.items():
            theirs[name].copy_(p)


@pytest.mark.parametrize("capture", ["traced", "exported"])
def test_every_granularity_computes_the_same_from_the_same_tensors(capture):
    ids = torch.tensor([[1, 2, 10], [0, 0, 3]])
    targets = ["up", "down", "w", "head"]
    module: Any = Called()
    traced: Any = fx.symbolic_trace(copy.deepcopy(module))
    model = traced if capture == "traced" else torch.export.export(copy.deepcopy(module), (ids,)).module()
    s = lrcompile.spec("lora", rank=2, targets=targets)
    fill(lrcompile.apply(module, s))
    same_factors(module, lrcompile.apply(model, s))
    torch.testing.assert_close(model(ids), module(ids))
    for each in (module, model):
        each(ids).square().sum().backward()
    mine = dict(model.named_parameters())
    for name, p in module.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(mine[name].grad, p.grad)
    with lrcompile.disabled(model), lrcompile.disabled(module):
        torch.testing.assert_close(model(ids), module(ids))
    lrcompile.merge(model)
    torch.testing.assert_close(model(ids), module(ids), rtol=1e-4, atol=1e-5)
    lrcompile.remove(model)
    assert not [name for name in model.state_dict() if "lrcompile" in name]


def test_adapters_captured_with_a_graph_stay_in_it():
    inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3))
    fill(lrcompile.apply(inner, lrcompile.spec("lora", rank=2, targets=["0"])))
    x = torch.randn(2, WIDTH)
    program: Any = torch.export.export(inner, (x,)).module()
    y = program(x)
    lrcompile.apply(program, lrcompile.spec("lora", rank=2, targets=["1"]))
    torch.testing.assert_close(program(x), y)
    with lrcompile.disabled(program):
        torch.testing.assert_close(program(x), y)
    lrcompile.remove(program)
    with pytest.raises(lrcompile.TargetError, match="captured"):
        lrcompile.apply(program, lrcompile.spec("lora", rank=2, targets=["0"]))


def test_dropout_on_a_captured_graph_is_refused():
    model: Any = torch.export.export(Chain(), (torch.randn(3, WIDTH),)).module()
    with pytest.raises(lrcompile.SpecError, match="dropout must be 0") as caught:
        lrcompile.apply(model, lrcompile.spec("lora", rank=2, dropout=0.1))
    assert caught.value.field == "dropout"
    assert nodes(model) == 0
