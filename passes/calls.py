"""Operations of a captured graph that run a body: checkpointed regions, and regions that are compiled once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

_FIRST_OPERAND = {torch.ops.higher_order.tag_activation_checkpoint: 1, torch.ops.higher_order.invoke_subgraph: 2}
"""Operations that run one body exactly once; the body comes first, and its operands begin here."""


@dataclass(frozen=True)
class Call:
    """A node that runs `body` on operands."""

    node: fx.Node
    name: str
    """Of the body in the module that calls it; several nodes may."""
    body: fx.GraphModule

    def given(self) -> dict[fx.Node, fx.Node]:
        """The body's inputs, and what the node puts there."""
        target: Any = self.node.target
        operands: Any = self.node.args[_FIRST_OPERAND[target] :]
        return dict(zip(self.body.graph.find_nodes(op="placeholder"), operands, strict=True))

    def give(self, operand: fx.Node) -> None:
        """One operand more, behind the others."""
        self.node.args = (*self.node.args, operand)


def call_at(node: fx.Node, module: fx.GraphModule) -> Call | None:
    """The call that `node` is, if it is one."""
    target: Any = node.target
    if node.op != "call_function" or target not in _FIRST_OPERAND:
        return None
    held: Any = node.args[0]
    body: Any = module.get_submodule(held.target)
    return Call(node, held.target, body)
