"""A mixture's routed adapters keep each row's own code and its index, and nothing as wide as all experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from zoo.training import captured, flops, rewriting, step, targets

from lrcompile.dialect import experts as experts  # registers the op
from lrcompile.kernels.dropout import mask
from lrcompile.lowered.experts import RoutedLora
from lrcompile.passes.lower_experts import LowerExperts
from lrcompile.passes.nodes import EXPERTS
from lrcompile.passes.pipeline import Pipeline

lora_experts = torch.ops.lrcompile.lora_experts
IN, OUT, RANK, COUNT, T = 11, 7, 3, 4, 30
PIPELINE = Pipeline((LowerExperts(),))


def draw(*shape: int, grad: bool = False, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_(grad)


@settings(deadline=None, max_examples=80, derandomize=True)
@given(
    lead=st.sampled_from([(), (1,), (0,), (9,), (2, 3)]),
    count=st.integers(1, 4),
    rank=st.integers(1, 3),
    trains=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
    p=st.sampled_from([0.0, 0.4]),
)
def test_values_and_all_gradients_are_those_of_the_dialect(lead, count, rank, trains, p):
    y, x = draw(*lead, OUT, grad=trains[0]), draw(*lead, IN, grad=trains[1])
    A, B = draw(count, rank, IN, grad=trains[2]), draw(count, OUT, rank, grad=trains[3])
    scale, index = torch.tensor(0.7), torch.randint(0, count + 1, lead)  # `count` is no expert
    seed = torch.tensor(77) if p else None
    found = RoutedLora(p)(y, x, A, B, scale, index, seed)
    dropped = x * mask(x.reshape(-1, IN), p, 77).view_as(x) if p else x
    expected = lora_experts(y, dropped, A, B, scale, index)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert found.requires_grad == expected.requires_grad
    wanted = [each for each in (y, x, A, B) if each.requires_grad]
    if wanted:
        dy = torch.randn_like(found)
        gradients = torch.autograd.grad(found, wanted, dy)
        torch.testing.assert_close(gradients, torch.autograd.grad(expected, wanted, dy), rtol=1e-12, atol=1e-12)


class Mixture(nn.Module):
    """Routed maps of an input computed in the graph; what routes is an input."""

    def __init__(self, body: Callable[..., Any], dtype: torch.dtype = torch.float64, p: float = 0.0):
        super().__init__()
        self.body, self.p = body, p
        self.M = nn.Parameter(draw(IN, IN, dtype=dtype), requires_grad=False)
        self.W = nn.Parameter(draw(IN, OUT, dtype=dtype), requires_grad=False)
        self.A = nn.Parameter(draw(COUNT, RANK, IN, dtype=dtype))
        self.B = nn.Parameter(draw(COUNT, OUT, RANK, dtype=dtype))
        self.register_buffer("scale", torch.tensor(0.7))

    def routed(self, x: Tensor, index: Tensor) -> Tensor:
        h = x @ self.M
        return lora_experts(h @ self.W, h, self.A, self.B, self.scale, index, self.p)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return self.body(self, x, index)


def lead(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return draw(T, IN, grad=True, dtype=dtype), torch.randint(0, COUNT + 1, (T,))


BODIES: dict[str, Callable[..., Any]] = {
    "plain": Mixture.routed,
    "within a checkpoint": lambda net, x, index: checkpoint(net.routed, x.sin(), index, use_reentrant=False),
}


@pytest.mark.parametrize("name", BODIES)
def test_every_node_is_lowered_once_and_the_function_is_the_same(name):
    net, (x, index) = Mixture(BODIES[name]), lead()
    graphs = captured(net, x, index)
    assert sum(LowerExperts().apply(graph).count for graph in graphs) == 1
    assert not any(LowerExperts().apply(graph).modified for graph in graphs)
    everything = [target for graph in graphs for target in targets(graph)]
    assert sum(isinstance(target, RoutedLora) for target in everything) == 1
    assert not {EXPERTS, lora_experts} & set(everything)
    torch._dynamo.reset()
    outcomes = []
    for run in (net, torch.compile(net, backend=rewriting(PIPELINE), dynamic=False)):
        y = run(x, index)
        dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        outcomes.append((y, *torch.autograd.grad(y, (x, net.A, net.B), dy)))
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-12, atol=1e-11)


KEPT = {
    "both factors": ("", [(T, RANK), (T, IN)]),
    "A frozen": ("A", [(T, RANK)]),
    "B frozen": ("B", [(T, IN)]),
}


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("name", KEPT)
def test_a_row_keeps_its_own_code_whatever_the_number_of_experts(name, p):
    names, shapes = KEPT[name]
    net, (x, index) = Mixture(BODIES["plain"], p=p), lead()
    for each in names:
        getattr(net, each).requires_grad_(False)
    found = step(net, x, index, pipeline=PIPELINE)
    own = [shape for shape in found.shapes if shape != (T, COUNT)]  # bits, where they are fewer than indices
    assert own == ([()] if p else []) + shapes


def test_it_costs_the_products_of_one_wide_pair():
    y, x = draw(T, OUT, grad=True), draw(T, IN, grad=True)
    A, B, index = draw(COUNT, RANK, IN, grad=True), draw(COUNT, OUT, RANK, grad=True), torch.randint(0, COUNT, (T,))
    run = lambda: RoutedLora()(y, x, A, B, torch.tensor(0.7), index).sum().backward()  # noqa: E731
    assert flops(run) == 6 * T * COUNT * RANK * (IN + OUT)


def test_float32_factors_beside_a_bfloat16_base_get_float32_gradients_and_no_activation_is_cast():
    net, (x, index) = Mixture(BODIES["plain"], dtype=torch.bfloat16), lead(torch.bfloat16)
    net.A.data, net.B.data = net.A.data.float(), net.B.data.float()
    found = step(net, x, index, pipeline=PIPELINE)
    casts = [node for node in found.nodes() if node.target is torch.ops.aten._to_copy.default]
    sizes = {tuple(node.meta["val"].shape) for node in casts}
    assert casts
    assert not any(T in shape for shape in sizes)
    assert net.A.grad is not None
    assert net.A.grad.dtype == torch.float32


def test_a_scale_that_trains_is_left_with_a_reason():
    net, (x, index) = Mixture(
        lambda net, x, index: lora_experts(x @ net.W, x, net.A, net.B, net.A.mean(), index)
    ), lead()  # fmt: skip
    (graph,) = captured(net, x, index)
    result = LowerExperts().apply(graph)
    assert [refusal.reason for refusal in result.refusals] == ["its scale trains"]
    assert not result.modified
