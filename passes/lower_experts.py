"""lower-experts: lora_experts(y, x, A, B, s, e) = y + (C ⊙ (x·Âᵀ))·(sB̂)ᵀ, kept as each row's own code and e."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from lrcompile.lowered.experts import RoutedLora
from lrcompile.passes.base import Equivalence, Pass, Refusal, Result, Stage
from lrcompile.passes.captured import calls, dropout_of, trains, value
from lrcompile.passes.nodes import EXPERTS
from lrcompile.passes.replay_dropout import drawn_seed


@dataclass(frozen=True)
class LowerExperts(Pass[fx.GraphModule]):
    """lora_experts(y, x, A, B, s, e) = y + (C ⊙ (x·Âᵀ))·(sB̂)ᵀ: what is kept is each row's own code, and e.

    Neither the mask C nor a code as wide as all experts' lives in between; dropout's mask is drawn again from a seed.
    Refuses a scale that trains. Whatever computes y stays as it is: it is no linear map that could be fused with.
    """

    name: ClassVar[str] = "lower-experts"
    stage: ClassVar[Stage] = "dynamo"
    preserves: ClassVar[Equivalence] = "reassociation"

    def apply(self, subject: fx.GraphModule) -> Result:
        graph, refusals, count = subject.graph, [], 0
        for node in list(graph.nodes):
            if not calls(node, EXPERTS):
                continue
            if trains(node.args[4]):
                refusals.append(Refusal(node.name, "its scale trains"))
                continue
            p, operands = dropout_of(node), node.args[:6]
            with graph.inserting_before(node):
                if p:
                    operands = (*operands, drawn_seed(graph, value(operands[1])))
                lowered = graph.call_function(RoutedLora(p), operands)
                lowered.meta = {**node.meta}
            node.replace_all_uses_with(lowered)
            graph.erase_node(node)
            count += 1
        if count:
            graph.lint()
            subject.recompile()
        return Result(count, tuple(refusals))
