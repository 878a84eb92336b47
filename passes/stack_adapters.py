"""stack-adapters: y + s₁(x·A₁ᵀ)B₁ᵀ + s₂(x·A₂ᵀ)B₂ᵀ = y + x·[A₁; A₂]ᵀ·[s₁B₁ s₂B₂]ᵀ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from lrcompile.passes.base import Equivalence, Pass, Refusal, Result, Stage
from lrcompile.passes.captured import Places, calls, dropout_of, value
from lrcompile.passes.nodes import LORA


@dataclass(frozen=True)
class StackAdapters(Pass[fx.GraphModule]):
    """y + s₁(x·A₁ᵀ)B₁ᵀ + s₂(x·A₂ᵀ)B₂ᵀ = y + x·[A₁; A₂]ᵀ·[s₁B₁ s₂B₂]ᵀ: adapters of one site become one.

    Its rank is the sum of theirs, and `group-by-input` takes it whole. Refuses where another node sees the value in
    between, the inputs differ, tensors may change in between, or dropout is active: each adapter draws its own mask.
    """

    name: ClassVar[str] = "stack-adapters"
    stage: ClassVar[Stage] = "dynamo"
    preserves: ClassVar[Equivalence] = "reassociation"

    def apply(self, subject: fx.GraphModule) -> Result:
        graph, refusals, count = subject.graph, [], 0
        places = Places(graph)
        taken: set[fx.Node] = set()
        for last in reversed(list(graph.nodes)):
            if not calls(last, LORA) or last in taken:
                continue
            chain = [last]
            while calls(below := chain[0].args[0], LORA):
                if reason := _apart(below, chain[0], places):
                    refusals.append(Refusal(chain[0].name, reason))
                    break
                chain.insert(0, below)
            taken.update(chain)
            if len(chain) > 1:
                _stack(graph, chain)
                count += 1
        if count:
            graph.lint()
            subject.recompile()
        return Result(count, tuple(refusals))


def _apart(below: fx.Node, above: fx.Node, places: Places) -> str | None:
    """Why two adapters stay two."""
    if len(below.users) != 1:
        return "another node sees the value between two adapters"
    if below.args[1] is not above.args[1]:
        return "two adapters of one site have different inputs"
    if dropout_of(below) or dropout_of(above):
        return "dropout is active: each adapter draws its own mask"
    if any(value(each.args[2]).dim() != 2 for each in (below, above)):
        return "their factors are stacks"
    if places.written(below, above):
        return "tensors or modes may change between two adapters"
    return None


def stacked_down(As: Sequence[Tensor]) -> Tensor:
    """[A₁; A₂; …], of the widest of their dtypes."""
    return torch.cat(list(As))


def stacked_up(Bs: Sequence[Tensor], scales: Sequence[Tensor]) -> Tensor:
    """[s₁B₁ s₂B₂ …], each multiplied in the wider of its two dtypes."""
    wide = [torch.promote_types(B.dtype, scale.dtype) for B, scale in zip(Bs, scales, strict=True)]
    return torch.cat([B.to(w) * scale.to(w) for B, scale, w in zip(Bs, scales, wide, strict=True)], 1)


def unit(like: Tensor) -> Tensor:
    return torch.ones_like(like)


def _stack(graph: fx.Graph, chain: Sequence[fx.Node]) -> None:
    last = chain[-1]
    As, Bs, scales = ([each.args[index] for each in chain] for index in (2, 3, 4))
    with graph.inserting_before(last):
        A = _call(graph, stacked_down, As)
        B = _call(graph, stacked_up, Bs, scales)
        one = _call(graph, unit, scales[0])
    last.args = (chain[0].args[0], last.args[1], A, B, one)
    for each in reversed(chain[:-1]):
        graph.erase_node(each)


def _call(graph: fx.Graph, function: Any, *args: Any) -> fx.Node:
    """A node with the fake value of its result."""
    values = fx.map_arg(args, lambda node: node.meta["example_value"])
    # that of the values: Dynamo has put another in force by the time a backend is called
    fake = next(each.fake_mode for each in tree_leaves(values) if isinstance(each, FakeTensor))
    node = graph.call_function(function, args)
    with fake:
        node.meta = {"example_value": function(*values)}
    return node
