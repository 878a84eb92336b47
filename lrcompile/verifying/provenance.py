"""Which values of a flat graph are which module's: what leaves the module's scope, and what enters it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx


@dataclass(frozen=True)
class Step:
    """One node: the values it makes and uses, and the scopes it lies in (module paths, and `%name` for the traced node
    itself). The scope of the whole model is `""`, where it is known; a node without it was put in by a pass.
    """

    makes: Sequence[str]
    uses: Sequence[str]
    scopes: frozenset[str]


@dataclass(frozen=True)
class Scopes:
    """For each scope the values that leave it, the last one first, and those it uses without making them, in order.

    `makers` says of each value which node makes it, in the words of the graph.
    """

    leaving: Mapping[str, list[str]]
    entering: Mapping[str, list[str]]
    makers: Mapping[str, str]

    @classmethod
    def of(cls, steps: Iterable[Step], results: Iterable[str], makers: Mapping[str, str]) -> Scopes:
        steps = adopted(list(steps), list(results))
        return cls(scope_values(steps, results), scope_entries(steps), makers)


def adopted(steps: list[Step], results: Sequence[str]) -> list[Step]:
    """Nodes that a pass put in lie where all that use them lie: it expanded one node of that module."""
    if not any("" in step.scopes for step in steps):
        return steps  # nothing says what was there before
    used_in: dict[str, list[frozenset[str]]] = {name: [frozenset()] for name in results}
    found = []
    for step in reversed(steps):
        if "" not in step.scopes:
            users = [scopes for name in step.makes for scopes in used_in.get(name, ())]
            common = frozenset.intersection(*users) if users else frozenset()
            step = replace(step, scopes=step.scopes | {scope for scope in common if not scope.startswith("%")})
        for name in step.uses:
            used_in.setdefault(name, []).append(step.scopes)
        found.append(replace(step, scopes=step.scopes - {""}))
    return found[::-1]


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


def scope_entries(steps: Iterable[Step]) -> dict[str, list[str]]:
    """For each scope the values it uses and does not make, in the order of their first use."""
    made: dict[str, set[str]] = {}
    entering: dict[str, dict[str, None]] = {}
    for step in steps:
        for scope in step.scopes:
            inside = made.setdefault(scope, set())
            entering.setdefault(scope, {}).update(dict.fromkeys(name for name in step.uses if name not in inside))
            inside.update(step.makes)
    return {scope: list(names) for scope, names in entering.items()}


def graph_scopes(graph: fx.Graph) -> Scopes:
    """The scopes of an fx graph, from the module stack that tracing and exporting leave on its nodes."""
    steps, results, makers = [], [], {}
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
            makers[node.name] = f"%{node.name} = {node.target}"
    return Scopes.of(steps, results, makers)
