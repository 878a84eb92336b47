"""replay-dropout: lora(y, x, A, B, s, p) = y + s·((x ⊙ m(seed))·Aᵀ)Bᵀ, the seed drawn in the graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from lrcompile.lowered.dropout import ReplayedLora, seed_on
from lrcompile.passes.base import Equivalence, Pass, Refusal, Result, Stage
from lrcompile.passes.captured import calls, dropout_of, value
from lrcompile.passes.nodes import LORA


@dataclass(frozen=True)
class ReplayDropout(Pass[fx.GraphModule]):
    """lora(y, x, A, B, s, p) = y + s·((x ⊙ m(seed))·Aᵀ)Bᵀ: the backward pass draws the mask again from its seed.

    So neither the mask nor the dropped x is kept. The seed is a 0-d tensor from torch's generator of x's device:
    `torch.manual_seed` and checkpoints rule over it and nothing recompiles. The masks are other ones than those of
    `torch.nn.functional.dropout`, equal in distribution; what is computed with a mask is the same. Leaves stacks of
    maps as they are.
    """

    name: ClassVar[str] = "replay-dropout"
    stage: ClassVar[Stage] = "dynamo"
    preserves: ClassVar[Equivalence] = "reassociation"

    def apply(self, subject: fx.GraphModule) -> Result:
        graph, refusals, count = subject.graph, [], 0
        for node in list(graph.nodes):
            if not calls(node, LORA) or not (p := dropout_of(node)):
                continue
            operands = node.args[:5]
            if value(operands[2]).dim() != 2:
                refusals.append(Refusal(node.name, "its factors are a stack"))
                continue
            with graph.inserting_before(node):
                seed = drawn_seed(graph, value(operands[1]))
                replayed = graph.call_function(ReplayedLora(p), (*operands, seed))
                replayed.meta = {**node.meta}
            node.replace_all_uses_with(replayed)
            graph.erase_node(node)
            count += 1
        if count:
            graph.lint()
            subject.recompile()
        return Result(count, tuple(refusals))


def drawn_seed(graph: fx.Graph, x: Any) -> fx.Node:
    """A seed at the graph's insertion point, on the device of x."""
    node = graph.call_function(seed_on, (x.device,))
    with x.fake_mode:
        node.meta = {"example_value": torch.empty((), dtype=torch.int64, device=x.device)}
    return node
