"""hoist-constants: f(weights) in a graph = an input of the graph, computed when a weight has changed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from lrcompile.lowered.constants import Constant, Input
from lrcompile.passes.base import Equivalence, Pass, Refusal, Result, Stage
from lrcompile.passes.calls import Call, call_at
from lrcompile.passes.captured import operator_of, value, writes
from lrcompile.passes.nodes import STEP_CONSTANTS


@dataclass(frozen=True)
class HoistConstants(Pass[fx.GraphModule]):
    """g(x, f(W)) = g(x, c) with c = f(W): what weights alone decide, and autograd takes for a constant, is not computed
    at each call but once for each state of the weights.

    A norm of DoRA becomes a further input of the graph, behind the others; `constants` says which function of which
    inputs it is. Out of a checkpointed region it goes first into the graph around it, so that a replay does not compute
    it either. Equal ones become one. Refuses what reads a computed weight, or an input that the graph has written
    before.
    """

    name: ClassVar[str] = "hoist-constants"
    stage: ClassVar[Stage] = "dynamo"
    whole: ClassVar[bool] = True
    preserves: ClassVar[Equivalence] = "exact"

    def apply(self, subject: fx.GraphModule) -> Result:
        refusals: list[Refusal] = []
        count = _lift(subject, refusals) + _hoist(subject, refusals)
        return Result(count, tuple(refusals))


def constants(graph: fx.GraphModule) -> tuple[Constant, ...]:
    """What the last inputs of `graph` are that the pass has added."""
    return graph.meta.get(_KEY, ())


_KEY = "lrcompile_constants"


def _hoist(module: fx.GraphModule, refusals: list[Refusal]) -> int:
    """Movable nodes of the outermost graph become its inputs."""
    found = _movable(module, refusals)
    index = {node: i for i, node in enumerate(module.graph.find_nodes(op="placeholder"))}
    for nodes in found:
        args = [Input(index[each]) if isinstance(each, fx.Node) else each for each in nodes[0].args]
        made = Constant(nodes[0].target, tuple(args), value(nodes[0]))  # type: ignore[arg-type]
        module.meta[_KEY] = (*constants(module), made)
        _become_input(module, nodes)._dynamo_source = None
    return _tidied(module, found)


def _lift(module: fx.GraphModule, refusals: list[Refusal]) -> int:
    """Movable nodes of bodies become operands of their calls, innermost bodies first."""
    calls: dict[str, list[Call]] = {}
    for node in module.graph.nodes:
        if (call := call_at(node, module)) is not None:
            calls.setdefault(call.name, []).append(call)
    count = 0
    for callers in calls.values():
        body = callers[0].body
        count += _lift(body, refusals)
        found = _movable(body, refusals)
        for nodes in found:
            for caller in callers:
                given = caller.given()
                with module.graph.inserting_before(caller.node):
                    caller.give(module.graph.node_copy(nodes[0], given.__getitem__))
            _become_input(body, nodes)
        count += _tidied(body, found)
        if found:
            module.recompile()
    return count


def _become_input(module: fx.GraphModule, nodes: list[fx.Node]) -> fx.Node:
    """A new last placeholder in the place of `nodes`."""
    *_, last = module.graph.find_nodes(op="placeholder")
    with module.graph.inserting_after(last):
        made = module.graph.placeholder(nodes[0].name)
    made.meta = {"example_value": value(nodes[0])}
    for node in nodes:
        node.replace_all_uses_with(made)
        module.graph.erase_node(node)
    return made


def _tidied(module: fx.GraphModule, found: list[list[fx.Node]]) -> int:
    if found:
        module.graph.lint()
        module.recompile()
    return sum(map(len, found))


def _movable(module: fx.GraphModule, refusals: list[Refusal]) -> list[list[fx.Node]]:
    """The nodes that may be computed before the graph runs, equal ones together."""
    found: dict[Any, list[fx.Node]] = {}
    written: set[int] = set()
    for node in module.graph.nodes:
        if operator_of(node) in STEP_CONSTANTS:
            if node.kwargs:
                refusals.append(Refusal(node.name, "its arguments are given by name"))
            elif any(each.op != "placeholder" for each in node.all_input_nodes):
                refusals.append(Refusal(node.name, "it reads a weight that is computed in the graph"))
            elif any(written & _storages(each) for each in node.all_input_nodes):
                refusals.append(Refusal(node.name, "an input it reads is written before it"))
            else:
                found.setdefault((node.target, node.args), []).append(node)
        elif writes(node):
            written.update(_written(node, module))
    return list(found.values())


def _written(node: fx.Node, module: fx.GraphModule) -> Iterator[int]:
    """The storages that a node may write; of a call, those that its body writes."""
    call = call_at(node, module)
    if call is None:
        for each in node.all_input_nodes:
            yield from _storages(each)
        return
    inside = {storage for each in call.body.graph.nodes if writes(each) for storage in _written(each, call.body)}
    for placeholder, operand in call.given().items():
        if inside & _storages(placeholder):
            yield from _storages(operand)


def _storages(node: Any) -> set[int]:
    leaves = tree_leaves(value(node))
    return {t.untyped_storage()._cdata for t in leaves if isinstance(t, Tensor) and t.layout is torch.strided}
