"""Training graphs as the compiler sees them: what Dynamo captured, and what AOTAutograd makes of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

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


def rewriting(pipeline: Pipeline, graphs: list[fx.GraphModule] | None = None) -> Callable[..., Any]:
    """A Dynamo backend that runs what a pipeline makes of a graph, without a compiler; appends it to `graphs`."""

    def backend(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        for body in bodies(graph):
            rewritten(pipeline, body)
            if graphs is not None:
                graphs.append(body)
        return graph.forward

    return backend


def targets(graph: fx.GraphModule) -> list[Any]:
    return [node.target for node in graph.graph.nodes if node.op not in ("placeholder", "output", "get_attr")]


@dataclass
class Step:
    """The forward and backward graphs that an inner compiler was given."""

    forward: list[fx.GraphModule] = field(default_factory=list)
    backward: list[fx.GraphModule] = field(default_factory=list)
    flops: int = 0
    """Of one run of both."""
    results: int = 0
    """Outputs of the compiled function; what the forward graph returns beyond them is kept for the backward pass."""

    @property
    def kept(self) -> list[Tensor]:
        """The fake values of what is kept; inputs of the graph and views of them are alive anyway."""
        (graph,) = self.forward
        *_, output = graph.graph.nodes
        nodes = dict.fromkeys(_viewed(each) for each in output.args[0][self.results :])
        values = [each.meta["val"] for each in nodes if each.op != "placeholder"]
        return [value for value in values if isinstance(value, Tensor)]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of what is kept, sorted."""
        return sorted(tuple(each.shape) for each in self.kept)

    @property
    def bytes(self) -> int:
        return sum(each.numel() * each.itemsize for each in self.kept)

    def nodes(self) -> list[fx.Node]:
        return [node for graph in (*self.forward, *self.backward) for node in graph.graph.nodes]

    def counts(self) -> dict[str, int]:
        """Of the calls that compute something large, in both graphs: products and our own ops, by name."""
        found = [node.target for node in self.nodes() if isinstance(node.target, torch._ops.OpOverload)]
        products = ("mm", "addmm", "bmm")
        return dict(Counter(
            each._opname for each in found if each.namespace == "lrcompile_kernels" or each._opname in products
        ))  # fmt: skip


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

            def run(*arguments: Any) -> Any:
                with _Flops() as counter:
                    outputs = graph.forward(*arguments)
                found.flops += counter.total
                return outputs

            return make_boxed_func(run)

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


_VIEWS = {
    torch.ops.aten.view.default,
    torch.ops.aten.t.default,
    torch.ops.aten.transpose.int,
    torch.ops.aten.unsqueeze.default,
}


def _viewed(node: fx.Node) -> fx.Node:
    """What a node is a view of."""
    while node.target in _VIEWS:
        node = node.args[0]  # type: ignore[assignment]
    return node


def flops(function: Callable[[], Any]) -> int:
    """Of a call that compiles nothing: Dynamo skips what runs under a mode."""
    with _Flops() as counter:
        function()
    return counter.total


class _Flops(TorchDispatchMode):
    """By torch's formulas. Its own counter hooks modules too, which compiled graphs do not take well."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        formula = flop_registry.get(function._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=result)
        return result
