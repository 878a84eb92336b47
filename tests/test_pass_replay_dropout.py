"""Dropout's mask is drawn again from a seed in the backward pass: neither it nor the dropped input is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint
from zoo.training import captured, rewriting, step, targets

from lrcompile.kernels.dropout import mask
from lrcompile.lowered.dropout import ReplayedLora, seed_on
from lrcompile.lowered.group import AdaptedGroup
from lrcompile.passes.group_by_input import GroupByInput
from lrcompile.passes.nodes import LORA
from lrcompile.passes.pipeline import Pipeline
from lrcompile.passes.replay_dropout import ReplayDropout

lora = torch.ops.lrcompile.lora
IN, OUT, RANK, T, P = 24, 20, 3, 60, 0.3
ALONE = Pipeline((ReplayDropout(),))
GROUPED = Pipeline((ReplayDropout(), GroupByInput()))


class Site(nn.Module):
    scale: Tensor

    def __init__(self, dtype: torch.dtype = torch.float64, trains_A: bool = True, seen: bool = False, p: float = P):
        super().__init__()
        self.W = nn.Parameter(torch.randn(OUT, IN, dtype=dtype), requires_grad=False)
        self.A = nn.Parameter(torch.randn(RANK, IN, dtype=dtype), requires_grad=trains_A)
        self.B = nn.Parameter(torch.randn(OUT, RANK, dtype=dtype))
        self.M = nn.Parameter(torch.randn(IN, IN, dtype=dtype), requires_grad=False)
        self.register_buffer("scale", torch.tensor(0.7))
        self.seen, self.p = seen, p

    def forward(self, x: Tensor) -> Tensor:
        h = x @ self.M  # computed in the graph, by what nobody would recompute
        y = F.linear(h, self.W)
        z = lora(y, h, self.A, self.B, self.scale, self.p if self.training else 0.0)
        return z + y if self.seen else z

    def explicit(self, x: Tensor, drawn: Tensor) -> Tensor:
        h = x @ self.M
        y = F.linear(h, self.W)
        z = y + self.scale.to(y.dtype) * ((h * drawn) @ self.A.t() @ self.B.t())
        return z + y if self.seen else z


def lead(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*(shape or (T,)), IN, dtype=dtype, requires_grad=True)


def compiled(site: nn.Module, pipeline: Pipeline, **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(site, backend=rewriting(pipeline), dynamic=False, **options)


def gradients(function: Callable[[Tensor], Tensor], site: nn.Module, x: Tensor) -> tuple[Any, ...]:
    y = function(x)
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return (y, *torch.autograd.grad(y, [x, *(each for each in site.parameters() if each.requires_grad)], dy))


PIPELINES = {"alone": ALONE, "grouped": GROUPED}


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("trains_A", [True, False])
@pytest.mark.parametrize("lead_shape", [(T,), (3, 5), (1,), (0,)])
def test_values_and_gradients_are_those_of_the_mask_of_the_seed(name, trains_A, lead_shape, monkeypatch):
    monkeypatch.setattr("lrcompile.passes.replay_dropout.seed_on", lambda device: torch.tensor(1234))
    site, x = Site(trains_A=trains_A), lead(*lead_shape)
    found = gradients(compiled(site, PIPELINES[name]), site, x)
    rows = x.reshape(-1, IN)
    expected = gradients(lambda x: site.explicit(x, mask(rows, P, 1234).view_as(x)), site, x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-11)


def test_a_node_with_dropout_becomes_a_seed_and_a_replay():
    site, x = Site(), lead()
    (graph,) = captured(site, x)
    before = targets(graph)
    result = ReplayDropout().apply(graph)
    after = targets(graph)
    assert (result.count, result.refusals) == (1, ())
    assert [target for target in after if isinstance(target, ReplayedLora)] == [ReplayedLora(P)]
    assert sum(target is seed_on for target in after) == 1
    assert len(after) == len(before) + 1
    code = graph.code
    assert not ReplayDropout().apply(graph).modified
    assert graph.code == code


def test_the_replay_is_grouped_with_what_shares_its_input_and_each_has_its_own_seed():
    one, other, plain = Site(), Site(), Site(p=0.0)

    def three(x: Tensor) -> tuple[Tensor, ...]:
        h = x.sin()
        return tuple(
            lora(F.linear(h, each.W), h, each.A, each.B, each.scale, each.p) for each in (one, plain, other)
        )  # fmt: skip

    (graph,) = captured(three, lead())
    for each in GROUPED:
        each.apply(graph)
    (group,) = (target for target in targets(graph) if isinstance(target, AdaptedGroup))
    assert group.drops == (P, 0.0, P)
    (node,) = (node for node in graph.graph.nodes if isinstance(node.target, AdaptedGroup))
    seeds = group.split(node.args[1:]).seeds
    assert seeds[1] is None
    assert seeds[0] is not seeds[2]


@pytest.mark.parametrize("name", PIPELINES)
def test_each_call_and_each_site_draws_another_mask_and_manual_seed_repeats_it(name):
    site, x = Site(), lead()
    function = compiled(site, PIPELINES[name])
    torch.manual_seed(3)
    first, second = function(x), function(x)
    torch.manual_seed(3)
    assert torch.equal(function(x), first)
    assert torch.equal(function(x), second)
    assert not torch.equal(first, second)


def test_a_new_seed_recompiles_nothing():
    site, x = Site(), lead()
    graphs: list[fx.GraphModule] = []
    torch._dynamo.reset()
    function = torch.compile(site, backend=rewriting(GROUPED, graphs), dynamic=False)
    for seed in range(5):
        torch.manual_seed(seed)
        function(x)
    assert len(graphs) == 1


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_the_mask_has_its_probability_and_its_mean(p):
    """Of 3·10⁵ independent elements, five standard deviations; and no correlation between neighbours or rows."""
    n = 300_000
    drawn = mask(torch.empty(n // 1000, 1000, dtype=torch.float64), p, 17)
    kept = drawn != 0
    assert set(drawn[kept].tolist()) == {1 / (1 - p)}
    deviation = (p * (1 - p) / n) ** 0.5
    assert abs(kept.double().mean().item() - (1 - p)) < 5 * deviation
    centred = kept.double() - (1 - p)
    for shifted in (centred.roll(1, 1), centred.roll(1, 0)):
        assert abs((centred * shifted).mean().item()) < 5 * p * (1 - p) / n**0.5
    assert not torch.equal(mask(drawn, p, 18), drawn)
    assert torch.equal(mask(drawn, p, 17), drawn)


def test_the_mean_of_a_site_with_dropout_is_the_site_without():
    site, x = Site(), lead(20)
    function = compiled(site, GROUPED)
    with torch.no_grad():
        draws = torch.stack([function(x) for _ in range(400)])
        plain = site.eval()(x)
    deviation = draws.std(0) / 400**0.5
    assert bool(((draws.mean(0) - plain).abs() < 6 * deviation).all())


KEPT = {
    "trained A": (Site, [(), (T, RANK), (T, IN)], 3),
    "LoRA-FA": (lambda: Site(trains_A=False), [(), (T, RANK)], 2),
    "y seen elsewhere": (lambda: Site(seen=True), [(), (T, RANK), (T, IN)], 3),
    "LoRA-FA, y seen elsewhere": (lambda: Site(trains_A=False, seen=True), [(), (T, RANK)], 2),
}


@pytest.mark.parametrize("name", KEPT)
def test_the_seed_stands_for_the_mask_between_the_passes(name):
    """LoRA-FA with dropout keeps rows·rank elements and eight bytes. Where x is kept it is x itself, not drop(x), which
    is formed once in either pass; a gradient goes through the mask once.
    """
    make, shapes, drops = KEPT[name]
    found = step(make(), lead(), pipeline=GROUPED)
    assert found.shapes == shapes
    assert found.bytes == 8 * sum(torch.Size(shape).numel() for shape in shapes)
    assert found.counts()["drop"] == drops


def test_a_step_costs_what_it_costs_without_dropout():
    found = step(Site(), lead(), pipeline=GROUPED)
    assert found.flops == 4 * T * IN * IN + 4 * T * IN * OUT + 6 * T * RANK * (IN + OUT)


class Bare(nn.Module):
    """y = drop(x) where A and B are the identity: the mask can be read off."""

    def __init__(self, trains_A: bool, dtype: torch.dtype = torch.float64):
        super().__init__()
        self.A = nn.Parameter(torch.eye(IN, dtype=dtype), requires_grad=trains_A)
        self.B = nn.Parameter(torch.eye(IN, dtype=dtype))
        self.W = nn.Parameter(torch.zeros(IN, IN, dtype=dtype), requires_grad=False)
        self.register_buffer("one", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return lora(F.linear(x, self.W), x, self.A, self.B, self.one, P)


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("trains_A", [True, False])
@pytest.mark.parametrize("checkpointed", [True, False])
def test_one_mask_serves_a_step_and_its_recomputation(inner, trains_A, checkpointed):
    """y = (x ⊙ m)² and dx = 2·x ⊙ m_a ⊙ m_b, m_a of a checkpoint's second forward, m_b of the backward pass."""
    site, x = Bare(trains_A), torch.rand(T, IN, dtype=torch.float64).add_(0.5).requires_grad_()

    def square(z: Tensor) -> Tensor:
        return site(z).square()

    def body(x: Tensor) -> Tensor:
        return checkpoint(square, x, use_reentrant=False) if checkpointed else square(x)

    torch._dynamo.reset()
    function = torch.compile(body, backend="lrcompile", options={"inner": inner}, dynamic=False)
    runs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        y = function(x)
        torch.randn(3)  # what is drawn in between must not matter
        dx, dB = torch.autograd.grad(y.sum(), (x, site.B))
        drawn = y.detach().sqrt() / x.detach()
        assert 0.2 < (drawn == 0).double().mean() < 0.4
        torch.testing.assert_close(dx, 2 * x.detach() * drawn.square(), rtol=1e-12, atol=1e-12)
        dropped = x.detach() * drawn
        torch.testing.assert_close(dB, 2 * dropped.t() @ dropped, rtol=1e-12, atol=1e-10)
        runs.append(y.detach())
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_under_autocast_the_mask_is_one_and_dtypes_are_those_of_the_map(inner):
    site = Bare(True, torch.float32)
    x = torch.rand(T, IN).add_(0.5).requires_grad_()
    torch._dynamo.reset()
    function = torch.compile(site, backend="lrcompile", options={"inner": inner}, dynamic=False)
    with torch.autocast("cpu", torch.bfloat16):
        y = function(x)
    assert y.dtype == torch.bfloat16
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert dx.dtype == torch.float32
    assert torch.equal(dx == 0, y == 0)
    torch.testing.assert_close(dx[dx != 0], torch.full_like(dx[dx != 0], 1 / (1 - P)), rtol=2**-8, atol=0)


# --- what it leaves


def test_without_dropout_nothing_changes():
    site, x = Site().eval(), lead()
    (graph,) = captured(site, x)
    before = graph.code
    result = ReplayDropout().apply(graph)
    assert not result.modified
    assert graph.code == before


def test_a_stack_of_maps_keeps_plain_dropout_with_a_reason():
    site = Site()

    def stacked(x: Tensor) -> Tensor:
        z = x[None]
        return lora(F.linear(z, site.W), z, site.A[None], site.B[None], site.scale, P)

    (graph,) = captured(stacked, lead())
    result = ReplayDropout().apply(graph)
    assert [refusal.reason for refusal in result.refusals] == ["its factors are a stack"]
    assert not result.modified
    assert any(target in (lora, LORA) for target in targets(graph))


def test_a_probability_that_is_symbolic_becomes_a_constant_of_the_graph():
    """With dynamic=True Dynamo passes floats of modules as inputs."""
    site, x = Site(), lead()
    (graph,) = captured(site, x, dynamic=True)
    assert ReplayDropout().apply(graph).modified
    assert [target for target in targets(graph) if isinstance(target, ReplayedLora)] == [ReplayedLora(P)]
    torch._dynamo.reset()
    graphs: list[fx.GraphModule] = []
    function = torch.compile(site, backend=rewriting(GROUPED, graphs), dynamic=True)
    for p in (P, 0.9, P, 0.9):
        site.p = p
        function(x)
    groups = [target for graph in graphs for target in targets(graph) if isinstance(target, AdaptedGroup)]
    assert [group.drops for group in groups] == [(P,), (0.9,)]
