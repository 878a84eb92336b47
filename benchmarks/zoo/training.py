"""Training graphs as the compiler sees them: what Dynamo captured, and what AOTAutograd makes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch.utils.flop_counter import FlopCounterMode

from lrcompile.passes.captured import bodies
from lrcompile.passes.pipeline import Pipeline
from lrcompile.passes.train import train


def captured(function: Callable[..., Any], *inputs: Any, dynamic: bool | None = False) -> list[fx.GraphModule]:
    """The graphs Dynamo captures of a call, and the bodies of checkpoints in them."""
    found: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        found.extend(bodies(graph))
        return graph.forward

    torch._dynamo.reset()
    torch.compile(function, backend=keep, dynamic=dynamic)(*inputs)
    return found


def rewritten(pipeline: Pipeline, graph: fx.GraphModule) -> list[Any]:
    """The result of each pass."""
    return [each.apply(graph) for each in pipeline]


def targets(graph: fx.GraphModule) -> list[Any]:
    return [node.target for node in graph.graph.nodes if node.op not in ("placeholder", "output", "get_attr")]


@dataclass
class Step:
    """The forward and backward graphs that an inner compiler was given, and what it returned."""

    forward: list[fx.GraphModule] = field(default_factory=list)
    backward: list[fx.GraphModule] = field(default_factory=list)
    results: int = 0
    """Outputs of the compiled function; what a forward graph returns beyond them is kept for the backward pass."""

    @property
    def kept(self) -> list[Tensor]:
        """The fake values of what is kept, inputs of the graph aside: they are alive anyway."""
        (graph,) = self.forward
        *_, output = graph.graph.nodes
        nodes = [each for each in output.args[0][self.results :] if isinstance(each, fx.Node)]
        return [each.meta["val"] for each in nodes if each.op != "placeholder" and isinstance(each.meta["val"], Tensor)]

    @property
    def kept_inputs(self) -> list[str]:
        (graph,) = self.forward
        *_, output = graph.graph.nodes
        return [each.name for each in output.args[0][self.results :] if each.op == "placeholder"]

    @property
    def bytes(self) -> int:
        return sum(each.numel() * each.itemsize for each in self.kept)

    def nodes(self) -> list[fx.Node]:
        return [node for graph in (*self.forward, *self.backward) for node in graph.graph.nodes]

    def count(self, target: Any) -> int:
        """Of calls to an op, in both graphs."""
        return sum(node.target is target for node in self.nodes())


def step(
    function: Callable[..., Any], *inputs: Any, pipeline: Pipeline | None = None, dynamic: bool | None = False
) -> Step:
    """Rewrite and compile `function`, run it forward and backward, and hand over the graphs.

    By the passes of `pipeline`, else by those of the backend; partitioned as Inductor partitions: as little as possible
    is kept. Gradients accumulate in the inputs and parameters.
    """
    found = Step()

    def record(into: list[fx.GraphModule]) -> Callable[..., Any]:
        def compiler(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
            into.append(graph)
            return make_boxed_func(graph.forward)

        return compiler

    inner = aot_autograd(
        fw_compiler=record(found.forward),
        bw_compiler=record(found.backward),
        partition_fn=min_cut_rematerialization_partition,
    )

    def backend(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        for body in bodies(graph):
            rewritten(train() if pipeline is None else pipeline, body)
        return inner(graph, example_inputs)

    torch._dynamo.reset()
    outputs = torch.compile(function, backend=backend, dynamic=dynamic)(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    found.results = len(outputs)
    torch.autograd.backward(outputs, [torch.randn_like(each) for each in outputs])
    return found


def flops(function: Callable[[], Any]) -> int:
    """What `torch.utils.flop_counter` counts in a call."""
    counter = FlopCounterMode(display=False)
    with counter:
        function()
    return counter.get_total_flops()
