"""Copies of graphs as Dynamo captures them."""

from __future__ import annotations

from torch import fx


def duplicate(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph and of the bodies that it calls, with all that a compiler wants to know of them.

    Dynamo goes on to read the inputs of the graph it has handed over, and may hand it over again.
    """
    copies: dict[fx.Node, fx.Node] = {}
    graph = fx.Graph(tracer_cls=module.graph._tracer_cls)
    result = graph.graph_copy(module.graph, copies, return_output_node=True)
    assert isinstance(result, tuple)
    value, output = result
    graph.output(value).meta = {**output.meta}
    for node in module.graph.find_nodes(op="placeholder"):
        if hasattr(node, "_dynamo_source"):
            copies[node]._dynamo_source = node._dynamo_source
    copied = fx.GraphModule(module, graph)
    for name, child in module.named_children():
        if isinstance(child, fx.GraphModule):
            copied.add_module(name, duplicate(child))
    copied.meta = {**module.meta}
    vars(copied).update({name: each for name, each in vars(module).items() if name not in vars(copied)})
    return copied
