"""The backend that `compile` hands to torch: the registered one, with a memory budget and an account of what it did."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch._functorch.config as autograd
from torch import fx

from lrcompile.accounts import Graph
from lrcompile.backend import Compiled, lrcompile
from lrcompile.passes.base import Pass, Result
from lrcompile.passes.captured import bodies, operator_of


@dataclass
class Rewriting:
    """A Dynamo backend. Equal ones may serve each other's compiled graphs, so what they differ in is compared."""

    mode: str | None = None
    options: dict[str, Any] | None = None
    memory_budget: float | None = None
    graphs: list[Graph] = field(default_factory=list, compare=False)

    __name__ = "lrcompile"

    def __call__(self, graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        nodes = [node for body in bodies(graph) for node in body.graph.nodes if node.op.startswith("call_")]
        ours = [node for node in nodes if str(operator_of(node)).startswith("lrcompile.")]
        self.graphs.append(Graph(len(nodes), len(ours)))
        budget: Any = autograd
        with nullcontext() if self.memory_budget is None else budget.patch(activation_memory_budget=self.memory_budget):
            return lrcompile(graph, example_inputs, mode=self.mode, options=self.options, record=self._record)

    def _record(self, each: Pass, result: Result) -> None:
        self.graphs[-1].results.append((each.name, result))
