"""The rewrite of a graph: after each product with an adapted weight, its live adapters.

    y = x·Wᵀ (+ b)   becomes   y' = adapter(… adapter(y, x) …, x)

An adapter is inlined, so that the graph holds its one dialect op and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx, nn

from lrcompile.adapters import ADAPTERS, AdapterSet
from lrcompile.sites.weight_uses import Use, reads_of, uses_of
from lrcompile.walking import submodule


def insert_adapters(graph: fx.Graph, root: nn.Module) -> int:
    """Make `graph`, whose attributes live on `root`, apply exactly the adapters that are live now; returns how many it
    inserted.

    What an earlier call inserted is taken out first, so the rule is idempotent. Raises `NotALinearMap` when a weight
    is used otherwise.
    """
    erase_adapters(graph, root)
    count = 0
    for target, reads in reads_of(graph).items():
        owner, _, slot = target.rpartition(".")
        sets = submodule(root, owner)._modules.get(ADAPTERS)
        adapters = None if sets is None else sets._modules.get(slot)
        if not isinstance(adapters, AdapterSet):
            continue
        shape = getattr(submodule(root, owner), slot).shape
        for index in range(len(uses_of(reads, shape))):
            use = uses_of(reads, shape)[index]  # anew: one use's result can be the next one's input
            for name in adapters.live_names():
                path = ".".join(part for part in (owner, ADAPTERS, slot, name) if part)
                use = _insert(graph, use, path, adapters[name])
                count += 1
    graph.lint()
    return count


def erase_adapters(graph: fx.Graph, root: nn.Module) -> None:
    """Take out every node the rule inserted: by what it reads, which copies and other rewrites of the graph keep."""
    doomed = {node for node in graph.nodes if node.op == "get_attr" and _is_factor(root, str(node.target))}
    for node in graph.nodes:
        if doomed.isdisjoint(node.all_input_nodes):
            continue
        if getattr(node.target, "namespace", None) == "lrcompile":
            node.replace_all_uses_with(node.args[0])  # y of op(y, x, A, B, …)
        doomed.add(node)
    for node in reversed(graph.nodes):
        if node in doomed:
            graph.erase_node(node)


def _is_factor(root: nn.Module, target: str) -> bool:
    """Is this attribute a tensor of an adapter that lrcompile holds, rather than one captured with the graph?"""
    host, mark, rest = target.partition(f"{ADAPTERS}.")
    if not mark:
        return False
    sets = submodule(root, host.rstrip("."))._modules.get(ADAPTERS)
    adapters = None if sets is None else sets._modules.get(rest.partition(".")[0])
    return adapters is None or isinstance(adapters, AdapterSet)  # None: just taken off


def _insert(graph: fx.Graph, use: Use, path: str, adapter: nn.Module) -> Use:
    tracer = fx.Tracer()
    constants: dict[str, Any] = {"host": None}
    arguments = ["y", "x", "host"]
    if use.form == "lookup":
        tracer.traced_func_name = "lookup"
        constants = {"padding_idx": use.padding_idx}
        arguments = ["y", "ids", "padding_idx"]
    body = tracer.trace(adapter, constants)
    drop_constants(body, arguments, constants)
    inputs = iter((use.node, use.x))
    mapped: dict[fx.Node, Any] = {}
    users = list(use.node.users)
    last = use.node
    for node in body.nodes:
        if node.op == "placeholder":
            mapped[node] = next(inputs, None)
        elif node.op == "output":
            result = mapped[node.args[0]]
        else:
            with graph.inserting_after(last):
                last = graph.node_copy(node, lambda n: mapped[n])
            if node.op == "get_attr":
                last.target = f"{path}.{node.target}"
            mapped[node] = last
    for user in users:
        user.replace_input_with(use.node, result)
    return Use(result, use.x, use.form, use.transposed, use.padding_idx)


def drop_constants(graph: fx.Graph, arguments: Sequence[str], constants: Mapping[str, Any]) -> None:
    """Constants are in the traced code already: take out their placeholders and the assertions fx puts on them.

    `arguments` are those of the traced function in order, each of which has one placeholder.
    """
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    doomed = {node for node, name in zip(placeholders, arguments, strict=False) if name in constants}
    for node in graph.nodes:
        if any(given in doomed for given in node.all_input_nodes):
            doomed.add(node)
    for node in reversed(graph.nodes):
        if node in doomed:
            graph.erase_node(node)
