"""hoist-constants: norms of weights become inputs of the graph, computed once for each state of the weights."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import lrcompile
from lrcompile.backend import lrcompile as training_backend
from lrcompile.duplicating import duplicate
from lrcompile.lowered.constants import Constant, Input, WithConstants
from lrcompile.passes.captured import bodies, operator_of
from lrcompile.passes.hoist_constants import HoistConstants, constants
from lrcompile.passes.nodes import STEP_CONSTANTS

IN, OUT, RANK = 7, 9, 3
norm = torch.ops.lrcompile.dora_norm.default


def captured(model: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    """The graph that Dynamo captures, as a backend is given it."""
    graphs: list[fx.GraphModule] = []

    def backend(graph: fx.GraphModule, examples: Any) -> Callable[..., Any]:
        graphs.append(duplicate(graph))
        return graph.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend, fullgraph=True)(*inputs)
    return graphs[0]


def norms(graph: fx.GraphModule) -> int:
    return sum(operator_of(node) in STEP_CONSTANTS for body in bodies(graph) for node in body.graph.nodes)


def inputs_of(graph: fx.GraphModule) -> int:
    return len(graph.graph.find_nodes(op="placeholder"))


def hoisted(graph: fx.GraphModule, count: int, left: int = 0) -> fx.GraphModule:
    """Run the pass: it moves `count` nodes and leaves `left`; a second run does nothing."""
    assert norms(graph) == count + left
    result = HoistConstants().apply(graph)
    assert (result.modified, norms(graph), len(result.refusals)) == (count > 0, left, left)
    again = HoistConstants().apply(graph)
    assert (again.modified, again.refusals) == (False, result.refusals)
    return graph


class Direct(nn.Module):
    """A graph of our own around the op."""

    s: Tensor

    def __init__(self, body: Callable[..., Any]):
        super().__init__()
        torch.manual_seed(0)
        self.W, self.A = nn.Parameter(torch.randn(OUT, IN)), nn.Parameter(torch.randn(RANK, IN))
        self.B, self.m = nn.Parameter(torch.randn(OUT, RANK)), nn.Parameter(torch.rand(OUT))
        self.register_buffer("s", torch.tensor(0.7))
        self.body = body

    def norm(self, W: Tensor | None = None) -> Tensor:
        return norm(self.W if W is None else W, self.A, self.B, self.s)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


X = torch.randn(4, IN, generator=torch.Generator().manual_seed(1))


def direct(body: Callable[[Direct, Tensor], Any]) -> fx.GraphModule:
    return captured(Direct(body), X)


class Block(nn.Module):
    def __init__(self, recompute: bool = False):
        super().__init__()
        self.up, self.down, self.recompute = nn.Linear(IN, OUT, bias=False), nn.Linear(OUT, IN), recompute

    def inner(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False) if self.recompute else self.inner(x)


def adapted(model: Any) -> Any:
    return lrcompile.apply(model, lrcompile.spec("dora", rank=RANK))


def test_each_norm_becomes_an_input_behind_the_others():
    graph = captured(adapted(nn.Sequential(Block(), Block())), X)
    before = inputs_of(graph)
    hoisted(graph, 4)
    assert inputs_of(graph) == before + 4
    names = [node.target for node in graph.graph.find_nodes(op="placeholder")]
    for each in constants(graph):
        assert [("weight_", "A_", "B_", "scale_")[i] in names[each.args[i].index] for i in range(4)] == [True] * 4
    assert [tuple(each.example.shape) for each in constants(graph)] == [(OUT,), (IN,)] * 2


def test_the_norms_of_a_checkpointed_region_become_inputs_too():
    graph = hoisted(captured(adapted(nn.Sequential(Block(True), Block(True))), X), 4)
    assert len(constants(graph)) == 4


def test_a_checkpoint_in_a_checkpoint_is_left_by_way_of_the_outer_one():
    inner = adapted(Block(True))

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)

    graph = captured(Outer(), X)
    assert len(list(bodies(graph))) == 3
    assert len(constants(hoisted(graph, 2))) == 2


def test_a_map_that_acts_twice_has_one_norm():
    shared = adapted(Block())
    graph = hoisted(captured(lambda x: shared(shared(x)), X), 4)
    assert len(constants(graph)) == 2


def test_a_graph_without_such_nodes_stays():
    graph = captured(lrcompile.apply(Block(), lrcompile.spec("lora", rank=2)), X)
    before = graph.code
    hoisted(graph, 0)
    assert (graph.code, constants(graph)) == (before, ())


def test_the_norm_of_a_computed_weight_stays():
    hoisted(direct(lambda net, x: x @ net.W.t() / net.norm(net.W * 2)), 0, left=1)


@pytest.mark.parametrize("write", [
    lambda net, x: net.A.detach().mul_(2),
    lambda net, x: net.W.detach()[0].zero_(),
    lambda net, x: net.s.add_(1),
])  # fmt: skip
def test_the_norm_of_an_input_that_is_written_before_it_stays(write):
    def body(net: Any, x: Tensor) -> Tensor:
        first = net.norm()
        write(net, x)
        return first + net.norm()

    hoisted(direct(body), 1, left=1)


def test_writes_behind_the_norm_and_to_other_tensors_do_not_keep_it():
    def body(net: Any, x: Tensor) -> Tensor:
        y = x @ net.W.t()
        y.mul_(2)
        n = net.norm()
        net.s.add_(1)
        return y / n

    hoisted(direct(body), 1)


@pytest.mark.parametrize(("written", "left"), [("W", 1), ("x", 0)])
def test_what_a_checkpointed_region_writes_is_seen(written, left):
    def body(net: Direct, x: Tensor) -> Tensor:
        return checkpoint(lambda each: each * net.W.sum(), x, use_reentrant=False) / 2 + net.norm().sum()

    graph = direct(body)
    region = next(each for each in bodies(graph) if each is not graph)
    shape = {"W": (OUT, IN), "x": X.shape}[written]
    target = next(n for n in region.graph.find_nodes(op="placeholder") if n.meta["example_value"].shape == shape)
    with region.graph.inserting_before(next(n for n in region.graph.nodes if n.op.startswith("call"))):
        region.graph.call_method("zero_", (target,)).meta["example_value"] = target.meta["example_value"]
    region.recompile()
    hoisted(graph, 1 - left, left)


def test_the_graph_handed_over_stays_as_it_is():
    seen: list[tuple[str, str]] = []

    def backend(graph: fx.GraphModule, examples: Any) -> Callable[..., Any]:
        before = "".join(each.code for each in bodies(graph))
        compiled = training_backend(graph, examples, options={"inner": "aot_eager"})
        seen.append((before, "".join(each.code for each in bodies(graph))))
        return compiled

    torch._dynamo.reset()
    torch.compile(adapted(nn.Sequential(Block(True))), backend=backend)(X)
    ((before, after),) = seen
    assert before == after


# The values


class Doubling:
    """f(t) = 2t, and how often it was asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        self.calls += 1
        return tensor * 2


def given_doubles(*indices: int) -> tuple[WithConstants, list[Doubling]]:
    """A compiled function that answers what it is given, the double of some of its inputs included."""
    functions = [Doubling() for _ in indices]
    made = [
        Constant(function, (Input(index),), torch.empty(0)) for function, index in zip(functions, indices, strict=True)
    ]
    return WithConstants(lambda *given: given, tuple(made)), functions


def test_values_follow_their_inputs_and_only_what_changed_is_computed_again():
    one, other, x = torch.ones(3), torch.ones(2), torch.zeros(1)
    compiled, functions = given_doubles(0, 2)
    for _ in range(3):
        assert torch.equal(compiled(one, x, other)[3], one * 2)
    one.mul_(5)
    assert torch.equal(compiled(one, x, other)[3], one * 2)
    assert [each.calls for each in functions] == [2, 1]
    x.add_(1)  # nothing is made of it
    compiled(one, x, other)
    assert [each.calls for each in functions] == [2, 1]


def test_the_values_of_several_modules_are_kept_apart():
    blocks = [torch.full((3,), float(i)) for i in range(4)]
    compiled, (function,) = given_doubles(0)
    for _ in range(3):
        for block in blocks:
            assert torch.equal(compiled(block)[1], block * 2)
    assert function.calls == 4


def test_no_weight_is_kept_alive_and_no_value_outlives_its_weights_for_long():
    compiled, _ = given_doubles(0)
    weight = torch.ones(3)
    compiled(weight)
    alive = weakref.ref(weight)
    storage = torch.multiprocessing.reductions.StorageWeakRef(weight.untyped_storage())
    del weight
    gc.collect()
    assert alive() is None
    assert storage.expired()
    for _ in range(50):
        compiled(torch.ones(3))
    assert len(compiled._kept) <= 2


def test_another_tensor_at_a_freed_ones_address_is_another_tensor():
    compiled, _ = given_doubles(0)
    for i in range(50):
        weight = torch.full((3,), float(i))
        assert torch.equal(compiled(weight)[1], weight * 2)
        del weight


def test_what_counts_no_versions_is_computed_at_each_call():
    compiled, (function,) = given_doubles(0)
    with torch.inference_mode():
        weight = torch.ones(3)
        for _ in range(3):
            weight.mul_(2)
            assert torch.equal(compiled(weight)[1], weight * 2)
    assert function.calls == 3


def test_a_value_from_inference_mode_serves_training():
    compiled, (function,) = given_doubles(0)
    weight = nn.Parameter(torch.ones(3))
    with torch.inference_mode():
        compiled(weight)
    value = compiled(weight)[1]
    assert not value.is_inference()
    assert not value.requires_grad
    assert function.calls == 1
