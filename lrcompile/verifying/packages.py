"""Where a compiled package leaves its reference, though it shows no intermediate values.

Its weights can be exchanged by name, so first the reference's own are put in their place: if it then holds, the fewest
weights that make it hold are at fault, found by halving. If it does not, the program of the reference is compiled again
with the value of every place as an output, and that package is measured place by place; it speaks for the given one
only where both give the same outputs.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from lrcompile.deployment.capture import capture
from lrcompile.deployment.deploying import Plan, deploy
from lrcompile.errors import LrcompileError
from lrcompile.passes.base import Program
from lrcompile.verifying.intermediates import Found, Shapes, matched
from lrcompile.verifying.manifest import described
from lrcompile.verifying.outputs import Inputs, aligned, copied, named_outputs
from lrcompile.verifying.places import deviation_ratio, examine, first_divergence
from lrcompile.verifying.provenance import graph_scopes
from lrcompile.verifying.references import ModuleReference
from lrcompile.verifying.replay import Deviation
from lrcompile.verifying.runners import PackageRunner
from lrcompile.verifying.verdict import Divergence, Limits, Place

_MOST_GUILTY = 8


def locate(
    judge: ModuleReference, candidate: PackageRunner, inputs: Inputs, limits: Limits
) -> tuple[tuple[Place, ...], Divergence | None, str | None]:
    """The places of the package where they can be known, the first diverging one, and what is to be said about it."""
    given = described(candidate.path)
    form = given.get("adapters", {}).get("form", "auto") if isinstance(given.get("adapters", {}), dict) else "auto"
    try:
        program = deploy(capture(judge.module, inputs).program, judge.module, Plan(form), keep_nf4=False).program
        program.compute()
    except LrcompileError as error:
        return (), None, f"no first divergence: the reference cannot be captured as the package was ({error})"
    own = judge.own([inputs], None)
    bounds = judge.expected([inputs], own)[0].bounds

    def worst(outputs: Mapping[str, Tensor]) -> tuple[float, float]:
        found = aligned(own[0], dict(outputs), candidate.label)
        ratios = (deviation_ratio(found[name], bound) for name, bound in bounds.items() if name in found)
        return max(ratios, default=(0.0, 0.0))

    ratio, largest = worst(candidate.run(inputs))
    weights = _weights(program, candidate.constants())

    def holds(names: list[str]) -> bool:
        return worst(candidate.run_with(inputs, {name: weights[name] for name in names}))[0] <= limits.bound_ratio

    guilty = _guilty(list(weights), holds)
    if ratio > limits.bound_ratio and guilty:
        names = ", ".join(guilty)
        found = Divergence(
            guilty[0].rpartition(".")[0] or guilty[0], ratio, None, largest, None, None, f"the weight {names}",
            inherited_ratio=0.0, compared=len(weights),
        )  # fmt: skip
        return (), found, f"with the reference's {names} in its place, {candidate.label} holds"
    return _compiled_again(judge, candidate, program, inputs, limits, own[0], bounds)


def _weights(program: Program, names: Sequence[str]) -> dict[str, Tensor]:
    """The reference's tensors for the package's constants, in the order of the graph."""
    exported = program.exported
    held = {**exported.state_dict, **exported.constants}
    return {name: value.detach() for name, value in held.items() if name in names and isinstance(value, Tensor)}


def _guilty(names: list[str], holds: Callable[[list[str]], bool]) -> list[str]:
    """The fewest names, in order, whose exchange makes it hold; empty if even all do not, or none are needed."""
    found: list[str] = []
    if not names or holds([]) or not holds(names):
        return []
    while not holds(found) and len(found) < _MOST_GUILTY:
        low, high = 0, len(names)  # the first `high` names suffice, the first `low` do not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if holds([*found, *names[:middle]]) else (middle, high)
        found.append(names[high - 1])
    return sorted(found, key=names.index)


def _compiled_again(
    judge: ModuleReference,
    candidate: PackageRunner,
    program: Program,
    inputs: Inputs,
    limits: Limits,
    own: dict[str, Tensor],
    bounds: Mapping[str, Deviation],
) -> tuple[tuple[Place, ...], Divergence | None, str | None]:
    outputs: dict[str, Tensor] = {}

    def find(given: Inputs, shapes: Shapes) -> dict[str, Found]:
        found, results = _marked(program, given, shapes)
        outputs.update(results)
        return found

    places = examine(judge.module, judge.base_copy(), find, inputs, judge.roundoff)
    theirs, mine = aligned(own, candidate.run(inputs), candidate.label), aligned(own, outputs, "the package again")
    apart = [
        name
        for name, bound in bounds.items()
        if name in mine and not _agree(theirs[name], mine[name], bound, limits.bound_ratio)
    ]
    if apart:
        note = (
            f"compiled again from the reference, the package gives other outputs ({', '.join(apart)}): "
            f"{candidate.label} was made by other code (small constants are part of it), not only from other weights"
        )
        return (), None, f"no first divergence: {note}"
    note = f"places of {candidate.label} are those of the same program compiled again with every place as an output"
    return places, first_divergence(places, limits, None), note


def _agree(one: Tensor, other: Tensor, bound: Deviation, limit: float) -> bool:
    if one.shape != other.shape:
        return False
    apart = (one.double() - other.double()).abs().nan_to_num()
    return bound.ratio(float(apart.max()) if apart.numel() else 0.0) <= limit


def _marked(program: Program, inputs: Inputs, shapes: Shapes) -> tuple[dict[str, Found], dict[str, Tensor]]:
    """The places' values and the outputs of the program compiled with both as outputs."""
    module = program.exported.module()
    scopes = graph_scopes(module.graph)
    asked = dict.fromkeys(name for names in (*scopes.leaving.values(), *scopes.entering.values()) for name in names)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    result: Any = graph.graph_copy(module.graph, copies)
    nodes = {node.name: twin for node, twin in copies.items() if node.name in asked and _is_float(node)}
    graph.output((result, tuple(nodes.values())))
    traced = fx.GraphModule(module, graph)
    flat = _flat(module, inputs)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = str(Path(folder, "marked.pt2"))
        exported = torch.export.export(traced, flat, strict=False).run_decompositions()
        torch._inductor.aoti_compile_and_package(exported, package_path=path)
        results, values = torch._inductor.aoti_load_package(path)(*copied(flat))
    found = matched(scopes, dict(zip(nodes, values, strict=True)), shapes)
    tree = torch.utils._pytree.tree_unflatten(list(results), program.exported.call_spec.out_spec)
    return {name: dataclasses.replace(each, node=None) for name, each in found.items()}, named_outputs(tree)


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _flat(module: fx.GraphModule, inputs: Inputs) -> tuple[Any, ...]:
    """The inputs in the order of the graph's placeholders."""
    names = [node.name for node in module.graph.nodes if node.op == "placeholder"]
    leaves = torch.utils._pytree.tree_leaves(inputs)
    by_name = dict(zip(names, leaves, strict=False))
    by_name |= {name: inputs[name] for name in names if isinstance(inputs, dict) and name in inputs}
    return tuple(by_name[name] for name in names)
