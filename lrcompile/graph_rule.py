"""The rewrite of a graph: after each product with an adapted weight, its live adapters.

    y = x·Wᵀ (+ b)   becomes   y' = adapter(… adapter(y, x) …, x)

An adapter is inlined, so that the graph holds its one dialect op and nothing else.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from lrcompile.weight_uses import Use, uses_of

MARK = "lrcompile"
"""Key in `node.meta` of the nodes this rule inserted."""


def insert_adapters(graph: fx.Graph, root: nn.Module) -> int:
    """Make `graph`, whose attributes live on `root`, apply exactly the adapters that are live now; returns how many it
    inserted.

    What an earlier call inserted is taken out first, so the rule is idempotent. Raises `NotALinearMap` when a weight
    is used otherwise.
    """
    erase_adapters(graph)
    count = 0
    for target in dict.fromkeys(node.target for node in graph.nodes if node.op == "get_attr"):
        owner, _, slot = str(target).rpartition(".")
        sets = root.get_submodule(owner)._modules.get("lrcompile_adapters")
        if sets is None or slot not in sets._modules:
            continue
        for use in uses_of(graph, str(target)):
            for name in sets[slot].live_names():  # type: ignore[index,operator]
                path = ".".join(part for part in (owner, "lrcompile_adapters", slot, name) if part)
                use = _insert(graph, use, path, root.get_submodule(path))
                count += 1
    graph.lint()
    return count


def erase_adapters(graph: fx.Graph) -> None:
    """Take out every node the rule inserted."""
    for node in reversed(graph.nodes):
        if MARK in node.meta:
            if replaced := node.meta[MARK]:
                node.replace_all_uses_with(replaced)
            graph.erase_node(node)


def _insert(graph: fx.Graph, use: Use, path: str, adapter: nn.Module) -> Use:
    tracer = fx.Tracer()
    constants: dict[str, Any] = {}
    if use.form == "lookup":
        tracer.traced_func_name = "lookup"
        constants = {"padding_idx": use.padding_idx}
    body = tracer.trace(adapter, constants or None)
    drop_constants(body, set(constants))
    inputs = iter((use.node, use.x))
    mapped: dict[fx.Node, Any] = {}
    users = list(use.node.users)
    last = use.node
    for node in body.nodes:
        if node.op == "placeholder":
            mapped[node] = next(inputs, None)
        elif node.op == "output":
            result = mapped[node.args[0]]  # type: ignore[index]
        else:
            with graph.inserting_after(last):
                last = graph.node_copy(node, lambda n: mapped[n])
            if node.op == "get_attr":
                last.target = f"{path}.{node.target}"
            last.meta[MARK] = None
            mapped[node] = last
    result.meta[MARK] = use.node
    for user in users:
        user.replace_input_with(use.node, result)
    return Use(result, use.x, use.form, use.transposed, use.padding_idx)


def drop_constants(graph: fx.Graph, names: set[str]) -> None:
    """Constants are in the traced code already: take out their placeholders and the assertions fx puts on them."""
    doomed = {n for n in graph.nodes if n.op == "placeholder" and str(n.target).rsplit("_", 1)[0] in names}
    for node in graph.nodes:
        if any(given in doomed for given in node.all_input_nodes):
            doomed.add(node)
    for node in reversed(graph.nodes):
        if node in doomed:
            graph.erase_node(node)
