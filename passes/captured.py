"""Graphs as Dynamo captures them: what their nodes are, and which may be moved past which.

Such a graph is not functional: nodes may write their inputs or change global state, so nothing is moved past one that
may. Shapes and dtypes lie in `meta["example_value"]`.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from lrcompile.lowered.bases import Base, Dense, Quantized
from lrcompile.passes.nodes import NF4_LINEAR


def bodies(module: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """The graph and every body of a higher-order operation in it (checkpoints, autocast regions), innermost last."""
    yield from (each for each in module.modules() if isinstance(each, fx.GraphModule))


def value(node: Any) -> Any:
    """The fake value of a node; what is no node is its own."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else node


def dropout_of(adapter: fx.Node) -> float:
    """The probability in force at a dialect node that ends with one. A symbolic one is made constant, with a guard."""
    index = len(operator_of(adapter)._schema.arguments) - 1
    return float(value(adapter.args[index])) if len(adapter.args) > index else 0.0


@dataclass(frozen=True)
class Linear:
    """A frozen linear map: y = xWᵀ + b."""

    x: fx.Node
    base: Base
    held: tuple[fx.Node | None, ...]
    bias: fx.Node | None
    nodes: tuple[fx.Node, ...]
    """What computes it, the last being y."""


def linear_at(y: Any) -> Linear | None:
    """The linear map that computes y, if that is one over tensors the graph is given and its weight does not train."""
    found = _linear(y)
    if found is None or any(not _given(node) for node in (*found.held, found.bias) if node is not None):
        return None
    if any(node is not None and trains(node) for node in found.held) or not isinstance(value(found.x), Tensor):
        return None
    return found


def _linear(y: Any) -> Linear | None:
    if not isinstance(y, fx.Node):
        return None
    if y.op == "call_function" and y.target in (F.linear, torch.ops.aten.linear.default) and not y.kwargs:
        x, W, bias = (*y.args, None)[:3]
        return Linear(x, Dense(), (W,), bias, (y,))  # type: ignore[arg-type]
    if operator_of(y) is NF4_LINEAR:
        x, *held, bias, out_features, in_features, block_size, transposed, dtype = y.args
        base = Quantized(out_features, in_features, block_size, transposed, dtype)  # type: ignore[arg-type]
        return Linear(x, base, tuple(held), bias, (y,))  # type: ignore[arg-type]
    return _conv1d(y)


def _conv1d(y: fx.Node) -> Linear | None:
    """transformers' Conv1D: addmm(b, x.view(-1, in), W).view(*, out)."""
    if y.op != "call_method" or y.target != "view" or not isinstance(y.args[0], fx.Node):
        return None
    product = y.args[0]
    if product.target is not torch.addmm or product.kwargs or len(product.users) != 1:
        return None
    bias, rows, W = product.args
    if not isinstance(rows, fx.Node) or rows.op != "call_method" or rows.target != "view" or len(rows.users) != 1:
        return None
    x: Any = rows.args[0]
    flat, whole = value(rows), value(x)
    if flat.dim() != 2 or flat.shape[-1] != whole.shape[-1] or value(y).shape[:-1] != whole.shape[:-1]:
        return None
    return Linear(x, Dense(transposed=True), (W,), bias, (rows, product, y))  # type: ignore[arg-type]


def operator_of(node: fx.Node) -> Any:
    """The target of a node, a packet of overloads being its default one."""
    packet = isinstance(node.target, torch._ops.OpOverloadPacket)
    return node.target.default if packet else node.target  # type: ignore[union-attr]


def calls(node: Any, *operators: Any) -> bool:
    """Is it a call of one of them with arguments by position, as all of our own are?"""
    return isinstance(node, fx.Node) and operator_of(node) in operators and not node.kwargs


def _given(node: fx.Node) -> bool:
    """Is it an input of the graph, or a tensor that the graph holds?"""
    return node.op in ("placeholder", "get_attr")


def trains(node: fx.Node) -> bool:
    found = value(node)
    return isinstance(found, Tensor) and found.requires_grad


def writes(node: fx.Node) -> bool:
    """May it change a tensor, random state or a global mode, so that nothing may be moved past it?"""
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    if node.op == "call_module" or "out" in node.kwargs:
        return True
    target = operator_of(node)
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    if isinstance(target, torch._ops.HigherOrderOperator):
        return True
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if getattr(target, "__module__", None) in ("_operator", "operator") and name in _IN_PLACE:
        return True
    return name in _STATEFUL or (name.endswith("_") and not name.endswith("__"))


_IN_PLACE = {
    "iadd", "iand", "ifloordiv", "ilshift", "imatmul", "imod", "imul", "ior", "ipow", "irshift", "isub", "itruediv",
    "ixor", "setitem", "delitem",
}  # fmt: skip
_STATEFUL = {
    "_enter_autocast", "_exit_autocast", "_set_grad_enabled", "_enter_inference_mode", "_exit_inference_mode",
    "_vmap_increment_nesting", "_vmap_decrement_nesting", "_saved_tensors_hooks_disable", "_saved_tensors_hooks_enable",
}  # fmt: skip


def draws(node: fx.Node) -> bool:
    """Is it a random number, another one at each call?"""
    target = operator_of(node)
    if isinstance(target, torch._ops.OpOverload):
        return torch.Tag.nondeterministic_seeded in target.tags
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return name.startswith(("rand", "normal", "bernoulli", "multinomial", "poisson")) or "dropout" in name


class Places:
    """Where the nodes of a graph are when it is made, and what lies between."""

    def __init__(self, graph: fx.Graph):
        self._place = {node: index for index, node in enumerate(graph.nodes)}
        self._barriers = [index for node, index in self._place.items() if writes(node)]

    def __getitem__(self, node: fx.Node) -> int:
        return self._place[node]

    def written(self, first: fx.Node, last: fx.Node) -> bool:
        """Does a node between the two write?"""
        return bisect_right(self._barriers, self[first]) < bisect_left(self._barriers, self[last])

    def ahead(self, nodes: Iterable[fx.Node], anchor: fx.Node) -> list[fx.Node]:
        """What computes `nodes`, as far as it does not lie before `anchor`, in order."""
        needed: set[fx.Node] = set()
        waiting = list(nodes)
        while waiting:
            node = waiting.pop()
            if self[node] >= self[anchor] and node not in needed:
                needed.add(node)
                waiting += node.all_input_nodes
        return sorted(needed, key=self.__getitem__)


def drop_dead(graph: fx.Graph) -> None:
    """Erase what nobody uses, but for what writes. (`eliminate_dead_code` takes in-place methods for pure ones.)"""
    for node in reversed(graph.nodes):
        if not node.users and not writes(node) and not node.is_impure():
            graph.erase_node(node)


def same(one: Any, other: Any) -> bool:
    """Do two arguments hold the same value? Equal nodes, or the same operations on equal ones."""
    if isinstance(one, fx.Node) and isinstance(other, fx.Node):
        if one is other:
            return True
        if one.op != other.op or one.target != other.target or one.op not in ("call_function", "call_method"):
            return False
        return not writes(one) and not draws(one) and same(one.args, other.args) and same(one.kwargs, other.kwargs)
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, slice) and isinstance(other, slice):
        return all(same(getattr(one, each), getattr(other, each)) for each in ("start", "stop", "step"))
    return type(one) is type(other) and one == other
