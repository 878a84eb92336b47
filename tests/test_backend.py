"""The Dynamo backend: which graphs it rewrites, whom it hands them to, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.backends import registry
from torch.utils.checkpoint import checkpoint

from lrcompile import SpecError
from lrcompile.backend import lrcompile
from lrcompile.lowered.group import AdaptedGroup
from lrcompile.passes.captured import bodies
from lrcompile.passes.train import train

lora = torch.ops.lrcompile.lora
IN, OUT, RANK = 12, 7, 3


class Net(nn.Module):
    def __init__(self, adapted: bool = True, checkpoints: int = 0):
        super().__init__()
        self.W = nn.Parameter(torch.randn(OUT, IN), requires_grad=False)
        self.A = nn.Parameter(torch.randn(RANK, IN))
        self.B = nn.Parameter(torch.randn(OUT, RANK))
        self.register_buffer("scale", torch.tensor(0.7))
        self.adapted, self.checkpoints = adapted, checkpoints

    def map(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.W)
        return lora(y, x, self.A, self.B, self.scale) if self.adapted else y + F.linear(F.linear(x, self.A), self.B)

    def forward(self, x: Tensor) -> Tensor:
        body: Callable[[Tensor], Tensor] = self.map
        for _ in range(self.checkpoints):
            inner = body
            body = lambda z, inner=inner: checkpoint(inner, z, use_reentrant=False)  # type: ignore[misc]  # noqa: E731
        return body(x)


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """The graphs that an inner compiler called `probe` was given."""
    graphs: list[fx.GraphModule] = []

    def probe(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    probe._tags = ()  # type: ignore[attr-defined]
    monkeypatch.setitem(registry._COMPILER_FNS, "probe", probe)
    monkeypatch.setitem(registry._BACKENDS, "probe", None)
    return graphs


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def groups(graph: fx.GraphModule) -> list[int]:
    """Of the graph and of each body in it, how many groups of maps there are."""
    return [sum(isinstance(node.target, AdaptedGroup) for node in body.graph.nodes) for body in bodies(graph)]


def compiled(net: nn.Module, **options: Any) -> Any:
    return torch.compile(net, backend="lrcompile", dynamic=False, **options)


def test_it_is_among_dynamo_s_backends():
    assert "lrcompile" in torch._dynamo.list_backends()
    assert torch._dynamo.lookup_backend("lrcompile") is not None


@pytest.mark.parametrize("checkpoints", [0, 1, 2])
def test_adapters_are_rewritten_wherever_they_lie(handed, checkpoints):
    net, x = Net(checkpoints=checkpoints), torch.randn(5, IN, requires_grad=True)
    y = compiled(net, options={"inner": "probe"})(x)
    torch.testing.assert_close(y, net(x), rtol=1e-5, atol=1e-5)
    assert groups(handed[0]) == [0] * checkpoints + [1]


def test_a_graph_without_adapters_is_handed_over_as_it_was_captured(handed):
    net, x = Net(adapted=False, checkpoints=1), torch.randn(5, IN)
    captured: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        captured.append(graph)
        return graph.forward

    torch.compile(net, backend=keep, dynamic=False)(x)
    torch._dynamo.reset()
    compiled(net, options={"inner": "probe"})(x)
    assert [body.code for body in bodies(handed[0])] == [body.code for body in bodies(captured[0])]


@pytest.mark.parametrize("name", ["no such compiler", "lrcompile"])
def test_an_inner_compiler_that_is_none_is_refused(name):
    net, x = Net(), torch.randn(5, IN)
    with pytest.raises(
        torch._dynamo.exc.BackendCompilerFailed, match=r"is not known; choose one of .*inductor"
    ) as info:
        compiled(net, options={"inner": name})(x)
    assert isinstance(info.value.__cause__ or info.value.inner_exception, SpecError)


@pytest.mark.parametrize("given", [{"options": {"inner": "aot_eager", "max_autotune": True}}])
def test_options_of_inductor_are_refused_for_another_compiler(given):
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="mode and options are for Inductor"):
        compiled(Net(), **given)(torch.randn(5, IN))


def test_a_mode_is_refused_for_another_compiler():
    (graph,) = bodies(fx.symbolic_trace(nn.Identity()))
    with pytest.raises(SpecError, match="mode and options are for Inductor"):
        lrcompile(graph, [], mode="max-autotune", options={"inner": "aot_eager"})


@pytest.mark.parametrize(
    "given",
    [{"mode": "max-autotune-no-cudagraphs"}, {"options": {"max_autotune": True}}, {"options": {"inner": "inductor"}}],
    ids=str,
)
def test_mode_and_options_reach_inductor(given, monkeypatch):
    seen: list[tuple[Any, Any]] = []

    class Wrapper:
        def __init__(self, mode: Any, options: Any, dynamic: Any):
            seen.append((mode, options))

        def __call__(self, graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
            return graph.forward

    monkeypatch.setattr(torch, "_TorchCompileInductorWrapper", Wrapper)
    compiled(Net(), **given)(torch.randn(5, IN))
    options = {key: value for key, value in given.get("options", {}).items() if key != "inner"}
    assert seen == [(given.get("mode"), options)]


def test_a_misspelt_option_of_inductor_is_its_own_error():
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="no_such_option"):
        compiled(Net(), options={"no_such_option": 1})(torch.randn(5, IN))


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_training_step_has_the_gradients_of_eager_mode(inner):
    net, x = Net(checkpoints=1).double(), torch.randn(5, IN, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(5, OUT, dtype=torch.float64)
    found = torch.autograd.grad(compiled(net, options={"inner": inner})(x), (x, net.A, net.B), dy)
    expected = torch.autograd.grad(net(x), (x, net.A, net.B), dy)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_every_pass_of_the_pipeline_is_of_its_stage_and_in_the_registry():
    from lrcompile import passes

    for each in train():
        assert each.stage == "dynamo"
        assert passes.get(each.name) is type(each)
    assert (
        str(train()) == "hoist-constants,stack-adapters,replay-dropout,lower-experts,lower-gains,group-by-input,"
        "order-contractions"
    )
