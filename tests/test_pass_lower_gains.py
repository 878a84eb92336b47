"""A gain's gradients become one operation, and nothing more is kept or computed for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from zoo.training import captured, rewriting, step, targets

from lrcompile.lowered.gain import Gain
from lrcompile.passes.lower_gains import LowerGains
from lrcompile.passes.nodes import GAIN
from lrcompile.passes.pipeline import Pipeline

gain = torch.ops.lrcompile.gain
OUT, T = 7, 12
PIPELINE = Pipeline((LowerGains(),))


class Net(nn.Module):
    """A map nobody would recompute, with a gain behind it and something beyond."""

    def __init__(self, body: Callable[..., Any], dtype: torch.dtype = torch.float64):
        super().__init__()
        self.body = body
        self.W = nn.Parameter(torch.randn(OUT, OUT, dtype=dtype), requires_grad=False)
        self.m = nn.Parameter(1 + torch.randn(OUT, dtype=dtype) / 4)
        self.n = nn.Parameter(1 + torch.rand(OUT, dtype=dtype), requires_grad=False)
        self.c = nn.Parameter(torch.randn(OUT, dtype=dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x @ self.W).sin()


def lead(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, T, OUT, dtype=dtype, requires_grad=True)


BODIES: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "m/n": lambda net, y: gain(y, net.m / net.n),
    "m/n with a bias": lambda net, y: gain(y, net.m.to(net.n.dtype) / net.n, net.c),
    "m": lambda net, y: gain(y, net.m),
    "a computed gain": lambda net, y: gain(y, (net.m - 1) * 2 + 1, net.c),
    "n trains": lambda net, y: gain(y, net.c / net.m),
    "a number": lambda net, y: gain(y, net.m / 3.0),
    "within a checkpoint": lambda net, y: checkpoint(lambda z: gain(z, net.m / net.n), y, use_reentrant=False),
}


@pytest.mark.parametrize("name", BODIES)
def test_every_gain_is_lowered_once_and_values_and_gradients_are_the_same(name):
    net, x = Net(BODIES[name]), lead()
    graphs = captured(net, x)
    assert sum(LowerGains().apply(graph).count for graph in graphs) == 1
    assert not any(LowerGains().apply(graph).modified for graph in graphs)
    everything = [target for graph in graphs for target in targets(graph)]
    assert sum(isinstance(target, Gain) for target in everything) == 1
    assert not {GAIN, gain} & set(everything)
    torch._dynamo.reset()
    outcomes = []
    for run in (net, torch.compile(net, backend=rewriting(PIPELINE), dynamic=False)):
        y = run(x)
        dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        outcomes.append((y, *torch.autograd.grad(y, (x, net.m), dy)))
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["m/n", "m/n with a bias"])
def test_a_step_keeps_y_alone_and_forms_both_gradients_in_one_operation(name):
    found = step(Net(BODIES[name]), lead(), pipeline=PIPELINE)
    assert [shape for shape in found.shapes if T in shape] == [(2, T, OUT)]
    assert found.counts() == {"mm": 2, "gain_gradients": 1}
    assert not [node for node in found.nodes() if node.target is torch.ops.aten.sum.dim_IntList]


def test_a_float32_gain_beside_bfloat16_outputs_has_the_digits_of_float32():
    net = Net(BODIES["m/n"])
    net.W.data, x = net.W.data.bfloat16(), lead(torch.bfloat16)
    net.m.data, net.n.data = net.m.data.float(), net.n.data.float()
    torch._dynamo.reset()
    gradients = []
    for run in (net, torch.compile(net, backend=rewriting(PIPELINE), dynamic=False)):
        y = run(x)
        assert y.dtype == torch.bfloat16
        gradients.append(torch.autograd.grad(y, net.m, torch.ones_like(y))[0])
    assert gradients[1].dtype == torch.float32
    torch.testing.assert_close(gradients[1], gradients[0], rtol=2**-7, atol=2**-7 * T)  # y' is rounded to bfloat16


REFUSED: dict[str, tuple[Callable[[Net, Tensor], Tensor], str]] = {
    "frozen": (lambda net, y: gain(y, net.n), "its gain does not train"),
    "c trains": (
        lambda net, y: gain(y, net.m, net.m * 2), "the part it leaves alone trains or is no vector"
    ),
    "c as wide as y": (
        lambda net, y: gain(y, net.m, (y * 2).detach()), "the part it leaves alone trains or is no vector"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_does_not_take_is_left_with_a_reason(name):
    body, reason = REFUSED[name]
    (graph,) = captured(Net(body), lead())
    before = graph.code
    result = LowerGains().apply(graph)
    assert [refusal.reason for refusal in result.refusals] == [reason]
    assert not result.modified
    assert graph.code == before


def test_a_quotient_whose_divisor_is_written_before_the_gain_stays_a_quotient():
    def written(net: Net, y: Tensor) -> Tensor:
        g, z = net.m / net.n, y * 1
        z.add_(1)
        return gain(z, g)

    net, x = Net(written), lead()
    (graph,) = captured(net, x)
    assert LowerGains().apply(graph).count == 1
    (node,) = [node for node in graph.graph.nodes if isinstance(node.target, Gain)]
    assert node.args[2] is None
