"""Which value of a flat graph is which module's output: the last one made inside the module's scope that something
outside uses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import fx


@dataclass(frozen=True)
class Step:
    """One node: the values it makes and uses, and the scopes it lies in (module paths, and `%name` for the traced node
    itself).
    """

    makes: Sequence[str]
    uses: Sequence[str]
    scopes: frozenset[str]


def scope_values(steps: Iterable[Step], results: Iterable[str]) -> dict[str, list[str]]:
    """For each scope the values that leave it, the last one first; `results` are used by the caller, outside every
    scope.
    """
    steps = list(steps)
    used_in: dict[str, list[frozenset[str]]] = {name: [frozenset()] for name in results}
    for step in steps:
        for name in step.uses:
            used_in.setdefault(name, []).append(step.scopes)
    leaving: dict[str, list[str]] = {}
    for step in reversed(steps):
        for scope in step.scopes:
            values = [name for name in step.makes if any(scope not in user for user in used_in.get(name, ()))]
            if values:
                leaving.setdefault(scope, []).extend(values)
    return leaving


def graph_scopes(graph: fx.Graph) -> dict[str, list[str]]:
    """`scope_values` of an fx graph, from the module stack that tracing and exporting leave on its nodes."""
    steps, results = [], []
    for node in graph.nodes:
        uses = [used.name for used in node.all_input_nodes]
        if node.op == "output":
            results = uses
        elif node.op.startswith("call_") and node.users:
            paths = {
                entry[0] for entry in (node.meta.get("nn_module_stack") or {}).values() if isinstance(entry, tuple)
            }
            paths |= {str(node.target)} if node.op == "call_module" else set()
            steps.append(Step([node.name], uses, frozenset(paths | {f"%{node.name}"})))
    return scope_values(steps, results)
