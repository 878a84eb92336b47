"""The first place where a candidate leaves the bound, all intermediate values coming from one run of each side.

A place is a module of the reference, named by its path, and its value the module's output; where the reference is a
flat graph, a place is a node (`%name`). y64 and D of every place come from the same float64 replays that bound the
outputs. In a candidate without modules (a graph, an ONNX file) values are found by provenance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn

from lrcompile.verifying.comparing import difference
from lrcompile.verifying.float64 import float64_copy, float64_mode, widen_inputs
from lrcompile.verifying.outputs import Inputs, call, copied
from lrcompile.verifying.provenance import graph_scopes
from lrcompile.verifying.replay import SEEDS, Deviation, Magnitudes, perturbed
from lrcompile.verifying.runners import ModuleRunner, Runner, evaluating
from lrcompile.verifying.verdict import Divergence

Shapes = Mapping[str, torch.Size]


def first_divergence(
    reference: nn.Module, candidate: Runner, inputs: Inputs, roundoff: float, limit: float
) -> tuple[Divergence | None, str | None]:
    """The first place, in the order the reference finishes them, with max|y - y64| > limit·D; else a note why there is
    none.

    What a place inherits is the largest ratio among the places before it: its own share is what exceeds that.
    """
    find = getattr(candidate, "intermediates", None)
    if isinstance(candidate, ModuleRunner):
        find = _finder(candidate.module)
    if find is None:
        return (
            None,
            f"no first divergence: {candidate.label} shows no intermediate values",
        )
    places = reference_places(reference, inputs, roundoff)
    actual = find(inputs, {name: place.exact.shape for name, place in places.items()})
    inherited, worst, compared = 0.0, "", 0
    for name, place in places.items():
        if name not in actual:
            continue
        compared += 1
        error = difference(actual[name], place)
        largest = float("inf") if error is None else float(error.abs().max()) if error.numel() else 0.0
        ratio = place.ratio(largest)
        if ratio > limit:
            return Divergence(name, ratio, inherited, largest, compared), None
        if ratio > inherited:
            inherited, worst = ratio, name
    if not compared:
        return None, f"no first divergence: no value of {candidate.label} could be traced to a place in the reference"
    most = f", the largest r is {inherited:.3g} at {worst}" if worst else ""
    return None, f"no first divergence: all {compared} places compared stay within their bounds{most}"


def reference_places(reference: nn.Module, inputs: Inputs, roundoff: float) -> dict[str, Deviation]:
    """y64 and D of every place whose value is one floating tensor, in order of completion."""
    twin = float64_copy(reference)
    places = {name: Deviation(value, roundoff) for name, value in _values64(twin, inputs).items()}
    magnitudes = Magnitudes()
    for seed in SEEDS:
        replayed = _values64(twin, inputs, perturbed(roundoff, seed, magnitudes))
        for name, place in places.items():
            place.update(replayed[name])
    return places


def _values64(twin: nn.Module, inputs: Inputs, inside: AbstractContextManager[None] | None = None) -> dict[str, Tensor]:
    with float64_mode(), inside or nullcontext():
        if isinstance(twin, fx.GraphModule):
            wanted = {node.name: f"%{node.name}" for node in twin.graph.nodes if node.op.startswith("call_")}
            return run_graph(twin, widen_inputs(inputs), wanted)
        return _run_hooked(twin, widen_inputs(inputs))


def _finder(module: nn.Module) -> Callable[[Inputs, Shapes], dict[str, Tensor]]:
    def find(inputs: Inputs, shapes: Shapes) -> dict[str, Tensor]:
        with torch.no_grad():
            if not isinstance(module, fx.GraphModule):
                return _run_hooked(module, copied(inputs))
            leaving = graph_scopes(module.graph)
            wanted = {value: value for scope in shapes for value in leaving.get(scope, ())}
            return matched(leaving, run_graph(module, copied(inputs), wanted), shapes)

    return find


def matched(leaving: Mapping[str, list[str]], values: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
    """For each place the last value that leaves its scope in the shape of the reference's."""
    found = {}
    for scope, shape in shapes.items():
        fitting = (values[name] for name in leaving.get(scope, ()) if name in values and values[name].shape == shape)
        value = next(fitting, None)
        if value is not None:
            found[scope] = value
    return found


def _run_hooked(module: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Each submodule's output by path, of those called once: a second call under the same path would be another
    place.
    """
    module = getattr(module, "_orig_mod", module)
    seen: dict[str, list[Tensor | None]] = {}

    def recorder(name: str) -> Callable[..., None]:
        def record(_module: nn.Module, _args: Any, output: Any) -> None:
            seen.setdefault(name, []).append(_single(output))

        return record

    with _hooks(module, recorder), evaluating(module):
        call(module, inputs)
    return {name: values[0] for name, values in seen.items() if len(values) == 1 and values[0] is not None}


@contextmanager
def _hooks(module: nn.Module, recorder: Callable[[str], Callable[..., None]]) -> Iterator[None]:
    handles = [part.register_forward_hook(recorder(name)) for name, part in module.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _single(output: Any) -> Tensor | None:
    """The one floating tensor that is a module's output, as in (hidden, None); copied, lest it be written over.

    Of several none is taken: in a flat graph nothing says which of the values that leave the scope is which.
    """
    parts = list(output.values()) if isinstance(output, dict) else output
    parts = parts if isinstance(parts, list | tuple) else [parts]
    tensors = [part for part in parts if isinstance(part, Tensor)]
    return tensors[0].detach().clone() if len(tensors) == 1 and tensors[0].is_floating_point() else None


def run_graph(module: fx.GraphModule, inputs: Inputs, wanted: Mapping[str, str]) -> dict[str, Tensor]:
    """Run a copy of the graph (same tensors) that hands over the value of each node in `wanted`, under the name given
    there.
    """
    values: dict[str, Tensor] = {}

    def record(name: str, value: Any) -> None:
        single = _single(value)
        if single is not None:
            values[name] = single

    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(module.graph, copies))
    graph.set_codegen(module.graph._codegen)
    for node, twin in copies.items():
        if node.name in wanted:
            with graph.inserting_after(twin):
                graph.call_function(record, (wanted[node.name], twin))
    traced = fx.GraphModule(module, graph)
    with evaluating(traced):
        call(traced, inputs)
    return values
