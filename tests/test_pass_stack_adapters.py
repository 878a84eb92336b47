"""Several active adapters on one site become one of the sum of their ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint
from zoo.training import captured, rewriting, step, targets

from lrcompile.lowered.group import AdaptedGroup
from lrcompile.passes.group_by_input import GroupByInput
from lrcompile.passes.nodes import LORA
from lrcompile.passes.pipeline import Pipeline
from lrcompile.passes.stack_adapters import StackAdapters

lora = torch.ops.lrcompile.lora
IN, OUT, T = 12, 7, 5
PIPELINE = Pipeline((StackAdapters(),))


class Site(nn.Module):
    """A frozen map with a pair of each of `ranks`, used as `body` says."""

    def __init__(self, body: Callable[..., Any], *ranks: int, dtype: torch.dtype = torch.float64):
        super().__init__()
        self.body = body
        self.W = nn.Parameter(torch.randn(OUT, IN, dtype=dtype), requires_grad=False)
        self.A = nn.ParameterList(torch.randn(rank, IN, dtype=dtype) for rank in ranks)
        self.B = nn.ParameterList(torch.randn(OUT, rank, dtype=dtype) for rank in ranks)
        for index in range(len(ranks)):
            self.register_buffer(f"scale{index}", torch.tensor(0.5 + index))

    def adapt(self, y: Tensor, x: Tensor, index: int, p: float = 0.0) -> Tensor:
        return lora(y, x, self.A[index], self.B[index], getattr(self, f"scale{index}"), p)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def all_active(site: Site, x: Tensor) -> Tensor:
    y = F.linear(x, site.W)
    for index in range(len(site.A)):
        y = site.adapt(y, x, index)
    return y


def lead(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, IN, dtype=dtype, requires_grad=True)


def rewritten(site: Site, x: Tensor) -> tuple[list[fx.GraphModule], list[str]]:
    graphs = captured(site, x)
    reasons = [refusal.reason for graph in graphs for refusal in StackAdapters().apply(graph).refusals]
    for graph in graphs:
        before = graph.code
        assert not StackAdapters().apply(graph).modified
        assert graph.code == before
    return graphs, reasons


def pairs(graph: fx.GraphModule) -> list[tuple[int, ...]]:
    """The shape of A of every adapter."""
    found = [node for node in graph.graph.nodes if node.target in (LORA, lora)]
    return [tuple(node.args[2].meta["example_value"].shape) for node in found]


def same_function(site: Site, x: Tensor) -> None:
    torch._dynamo.reset()
    outcomes = []
    for run in (site, torch.compile(site, backend=rewriting(PIPELINE), dynamic=False)):
        site.zero_grad()
        x.grad = None
        y = run(x)
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
        outcomes.append((y, x.grad, {name: each.grad for name, each in site.named_parameters()}))
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("ranks", [(3, 2), (1, 4, 2)])
def test_active_adapters_become_one_of_summed_rank(ranks):
    site, x = Site(all_active, *ranks), lead(2, T)
    assert pairs(captured(site, x)[0]) == [(rank, IN) for rank in ranks]
    ((graph,), reasons) = rewritten(site, x)
    assert pairs(graph) == [(sum(ranks), IN)]
    assert reasons == []
    same_function(site, x)


def test_the_stack_is_grouped_as_one_and_costs_what_one_of_its_rank_costs():
    site, x = Site(all_active, 3, 2), lead(T)
    pipeline = Pipeline((StackAdapters(), GroupByInput()))
    graphs: list[fx.GraphModule] = []
    torch._dynamo.reset()
    torch.compile(site, backend=rewriting(pipeline, graphs), dynamic=False)(x)
    assert sum(isinstance(target, AdaptedGroup) for target in targets(graphs[0])) == 1
    found = step(site, x, pipeline=pipeline)
    assert found.shapes == [(), (T, 5), (5, IN), (OUT, 5)]  # the code, and the stacked factors themselves
    assert found.flops == 4 * T * IN * OUT + 6 * T * 5 * (IN + OUT)


def test_scales_are_multiplied_in_float32_beside_bfloat16_factors():
    """0.3 and 1 + 2⁻⁹ are no bfloat16 numbers: their product with B is rounded once."""
    site, x = Site(all_active, 3, 2, dtype=torch.bfloat16), lead(T, dtype=torch.bfloat16)
    ((graph,), _) = rewritten(site, x)
    (node,) = (each for each in graph.graph.nodes if each.target in (LORA, lora))
    assert node.args[3].meta["example_value"].dtype == torch.float32


def test_adapters_within_a_checkpoint_are_stacked():
    site = Site(lambda site, x: checkpoint(lambda z: all_active(site, z.sin()), x, use_reentrant=False), 3, 2)
    x = lead(T)
    graphs, _ = rewritten(site, x)
    assert [pairs(graph) for graph in graphs] == [[], [(5, IN)]]
    same_function(site, x)


def test_one_adapter_is_left_as_it_is():
    site, x = Site(all_active, 3), lead(T)
    before = captured(site, x)[0].code
    ((graph,), reasons) = rewritten(site, x)
    assert graph.code == before
    assert reasons == []


def seen(site: Site, x: Tensor) -> Tensor:
    y = site.adapt(F.linear(x, site.W), x, 0)
    return site.adapt(y, x, 1) + y.sin()


def other_input(site: Site, x: Tensor) -> Tensor:
    return site.adapt(site.adapt(F.linear(x, site.W), x, 0), x.sin(), 1)


def dropped(site: Site, x: Tensor) -> Tensor:
    return site.adapt(site.adapt(F.linear(x, site.W), x, 0), x, 1, 0.5)


def stacks(site: Site, x: Tensor) -> Tensor:
    z, scale = x[None], site.scale0
    y = lora(F.linear(z, site.W), z, site.A[0][None], site.B[0][None], scale)
    return lora(y, z, site.A[1][None], site.B[1][None], scale)


def written(site: Site, x: Tensor) -> Tensor:
    z = x * 1
    y = site.adapt(F.linear(z, site.W), z, 0)
    z.add_(1)
    return site.adapt(y, z, 1)


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "the value between is seen": (seen, "another node sees the value between two adapters"),
    "another input": (other_input, "two adapters of one site have different inputs"),
    "active dropout": (dropped, "dropout is active: each adapter draws its own mask"),
    "stacks of maps": (stacks, "their factors are stacks"),
    "a write between them": (written, "tensors or modes may change between two adapters"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_adapters_that_are_not_of_one_value_and_input_stay_apart(name):
    body, reason = REFUSED[name]
    site, x = Site(body, 3, 2), lead(T)
    before = captured(site, x)[0].code
    ((graph,), reasons) = rewritten(site, x)
    assert graph.code == before
    assert reasons == [reason]


def test_of_three_adapters_the_two_without_dropout_become_one():
    def partly(site: Site, x: Tensor) -> Tensor:
        return site.adapt(site.adapt(site.adapt(F.linear(x, site.W), x, 0), x, 1), x, 2, 0.5)

    ((graph,), reasons) = rewritten(Site(partly, 3, 2, 4), lead(T))
    assert pairs(graph) == [(5, IN), (4, IN)]
    assert len(reasons) == 1
