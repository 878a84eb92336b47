"""lower-gains: gain(y, m/n, c) = (y − c) ⊙ m/n + c, the gradients of y and m from one operation."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from lrcompile.lowered.gain import Gain
from lrcompile.passes.base import Equivalence, Pass, Refusal, Result, Stage
from lrcompile.passes.captured import Places, calls, drop_dead, operator_of, trains, value
from lrcompile.passes.nodes import GAIN


@dataclass(frozen=True)
class LowerGains(Pass[fx.GraphModule]):
    """gain(y, m/n, c) = (y − c) ⊙ m/n + c, with ∂y = ∂y' ⊙ m/n and ∂m = Σ ∂y' ⊙ (y − c)/n from one operation.

    On a CPU, where a compiler would write out whatever makes ∂y' once more for each of them. The forward stays open to
    be fused with what is around it. Refuses where g does not train, or the part c does or is no vector.
    """

    name: ClassVar[str] = "lower-gains"
    stage: ClassVar[Stage] = "dynamo"
    preserves: ClassVar[Equivalence] = "reassociation"

    def apply(self, subject: fx.GraphModule) -> Result:
        graph, refusals, count = subject.graph, [], 0
        places = Places(graph)
        for node in list(graph.nodes):
            if not calls(node, GAIN) or value(node).device.type != "cpu":
                continue
            y, g, kept = (*node.args, None)[:3]
            if reason := _refusal(g, kept):
                refusals.append(Refusal(node.name, reason))
                continue
            m, n = _quotient(g, node, places)
            with graph.inserting_before(node):
                lowered = graph.call_function(Gain(), (y, m, n, kept))
                lowered.meta = {**node.meta}
            node.replace_all_uses_with(lowered)
            graph.erase_node(node)
            count += 1
        if count:
            drop_dead(graph)
            graph.lint()
            subject.recompile()
        return Result(count, tuple(refusals))


def _refusal(g: Any, kept: Any) -> str | None:
    if not trains(g):
        return "its gain does not train"
    if kept is not None and (trains(kept) or value(kept).shape != value(g).shape):
        return "the part it leaves alone trains or is no vector"
    return None


def _quotient(g: Any, reader: fx.Node, places: Places) -> tuple[fx.Node, fx.Node | None]:
    """m and n where g is m/n and n a constant, else g itself."""
    if operator_of(g) not in (operator.truediv, torch.div) or g.kwargs or places.written(g, reader):
        return g, None
    m, n = g.args
    vectors = all(isinstance(value(each), Tensor) and value(each).shape == value(g).shape for each in (m, n))
    same = vectors and value(m).dtype == value(n).dtype
    return (m, n) if same and trains(m) and not trains(n) else (g, None)
