"""The intermediate values of a reference and of a candidate, each side in one run.

A place is a module of the reference, named by its path, and its value the module's output; `entering <path>` is what
goes into it. Where the reference is a flat graph, a place is a node (`%name`). y64 and D of every place come from the
same float64 replays that bound the outputs. In a candidate without modules (a graph, an ONNX file) values are found by
provenance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from lrcompile.errors import VerificationError
from lrcompile.verifying.float64 import float64_copy, float64_mode, widen_inputs
from lrcompile.verifying.outputs import Inputs, call, copied
from lrcompile.verifying.provenance import Scopes, graph_scopes
from lrcompile.verifying.replay import SEEDS, Deviation, Magnitudes, perturbed
from lrcompile.verifying.runners import evaluating

ENTERING = "entering "
_ADAPTERS = "lrcompile_adapters"  # what is inside a site is the site's

Shapes = Mapping[str, torch.Size]
Swap = Callable[[str, Tensor], Tensor]
"""Is shown the value of each place when it is computed; what it returns is what the run goes on with."""


@dataclass(frozen=True)
class Found:
    """A candidate's value of a place, and its own name for what made it (None where that is the place itself)."""

    value: Tensor
    node: str | None = None


def reference_places(reference: nn.Module, inputs: Inputs, roundoff: float) -> dict[str, Deviation]:
    """y64 and D of every place whose value is one floating tensor, in order of completion."""
    twin = float64_copy(reference)
    places = {name: Deviation(value, roundoff) for name, value in values64(twin, inputs).items()}
    magnitudes = Magnitudes()
    for seed in SEEDS:
        replayed = values64(twin, inputs, perturbed(roundoff, seed, magnitudes))
        for name, place in places.items():
            place.update(replayed[name])
    return places


def values64(
    twin: nn.Module,
    inputs: Inputs,
    inside: AbstractContextManager[None] | None = None,
    swap: Swap = lambda name, value: value,
) -> dict[str, Tensor]:
    """The float64 value of every place that is computed once, before `swap` exchanged it."""
    with float64_mode(), inside or nullcontext():
        if isinstance(twin, fx.GraphModule):
            wanted = {node.name: f"%{node.name}" for node in twin.graph.nodes if node.op.startswith("call_")}
            return run_graph(twin, widen_inputs(inputs), wanted, swap)
        return run_hooked(twin, widen_inputs(inputs), swap)


def module_values(module: nn.Module, inputs: Inputs, shapes: Shapes) -> dict[str, Found]:
    """What a module or graph computes at the places of `shapes`."""
    module = getattr(module, "_orig_mod", module)
    with torch.no_grad():
        if not isinstance(module, fx.GraphModule):
            return {name: Found(value) for name, value in run_hooked(module, copied(inputs)).items()}
        scopes = graph_scopes(module.graph)
        names = (name for place in shapes for name in _names(scopes, place))
        wanted = {name: name for name in names if name in scopes.makers}
        return matched(scopes, run_graph(module, copied(inputs), wanted), shapes)


def matched(scopes: Scopes, values: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Found]:
    """For each place the last value that leaves its scope in the shape of the reference's; for what enters it the only
    one of that shape.
    """
    found = {}
    for place, shape in shapes.items():
        fitting = [name for name in _names(scopes, place) if name in values and values[name].shape == shape]
        if fitting and (len(fitting) == 1 or not place.startswith(ENTERING)):
            found[place] = Found(values[fitting[0]], scopes.makers.get(fitting[0]))
    return found


def _names(scopes: Scopes, place: str) -> list[str]:
    if place.startswith(ENTERING):
        return scopes.entering.get(place.removeprefix(ENTERING), [])
    return scopes.leaving.get(place, [])


def run_hooked(module: nn.Module, inputs: Inputs, swap: Swap = lambda name, value: value) -> dict[str, Tensor]:
    """What enters and leaves each submodule, of those called once: a second call under the same path would be another
    place.
    """
    seen: dict[str, list[Tensor | None]] = {}

    def pass_on(place: str, tree: Any) -> Any:
        """The tree with its one floating tensor as `swap` gives it; None if nothing changes."""
        value = _single(tree)
        seen.setdefault(place, []).append(None if value is None else value.detach().clone())
        if value is None:
            return None
        new = swap(place, value)
        return None if new is value else _with(tree, new)

    def enters(name: str) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> Any:
            new = pass_on(f"{ENTERING}{name}", [*args, *kwargs.values()])
            return None if new is None else (tuple(new[: len(args)]), dict(zip(kwargs, new[len(args) :], strict=True)))

        return hook

    def leaves(name: str) -> Callable[..., Any]:
        return lambda _module, _args, output: pass_on(name, output)

    with _hooks(module, enters, leaves), evaluating(module):
        call(module, inputs)
    return {name: values[0] for name, values in seen.items() if len(values) == 1 and values[0] is not None}


@contextmanager
def _hooks(
    module: nn.Module, enters: Callable[[str], Callable[..., Any]], leaves: Callable[[str], Callable[..., Any]]
) -> Iterator[None]:
    handles = []
    for name, part in module.named_modules():
        if name and _ADAPTERS not in name.split("."):
            handles.append(part.register_forward_pre_hook(enters(name), with_kwargs=True))
            handles.append(part.register_forward_hook(leaves(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _single(output: Any) -> Tensor | None:
    """The one floating tensor of a module's inputs or outputs, as in (hidden, None).

    Of several none is taken: in a flat graph nothing says which of the values that leave the scope is which.
    """
    parts = list(output.values()) if isinstance(output, dict) else output
    parts = parts if isinstance(parts, list | tuple) else [parts]
    tensors = [part for part in parts if isinstance(part, Tensor)]
    return tensors[0] if len(tensors) == 1 and tensors[0].is_floating_point() else None


def _with(output: Any, value: Tensor) -> Any:
    """`output` with its one tensor exchanged."""
    if isinstance(output, Tensor):
        return value
    if isinstance(output, dict):
        new = type(output)(output)
        for key, part in output.items():
            if isinstance(part, Tensor):
                new[key] = value
        return new
    parts = [value if isinstance(part, Tensor) else part for part in output]
    return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)


def run_graph(
    module: fx.GraphModule, inputs: Inputs, wanted: Mapping[str, str], swap: Swap = lambda name, value: value
) -> dict[str, Tensor]:
    """Run a copy of the graph (same tensors) that hands over the value of each node in `wanted`, under the name given
    there.
    """
    values: dict[str, Tensor] = {}

    def record(name: str, value: Any) -> Any:
        single = _single(value)
        if single is None:
            return value
        values[name] = single.detach().clone()
        new = swap(name, single)
        return value if new is single else _with(value, new)

    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(module.graph, copies))
    graph.set_codegen(module.graph._codegen)
    for node, twin in copies.items():
        if node.name in wanted:
            with graph.inserting_after(twin):
                handed = graph.call_function(record, (wanted[node.name], twin))
            twin.replace_all_uses_with(handed)
            handed.args = (wanted[node.name], twin)  # it reads what all others now read from it
    traced = fx.GraphModule(module, graph)
    with evaluating(traced):
        call(traced, inputs)
    return values


def has_graph(module: nn.Module) -> bool:
    return isinstance(getattr(module, "_orig_mod", module), fx.GraphModule)


def enclosing(place: str) -> str:
    """The module that makes a place's value: what enters one is made by the one around it."""
    path = place.removeprefix(ENTERING)
    return path if path == place else path.rpartition(".")[0]


def arguments(module: nn.Module, inputs: Inputs, path: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the submodule is called with in a run of the whole."""
    if not path:
        given = copied(inputs)
        return ((), given) if isinstance(given, dict) else (given, {})
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def own(leaf: Any) -> Any:
        return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf

    def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(pytree.tree_map(own, (args, kwargs)))

    handle = module.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad(), evaluating(module):
            call(module, copied(inputs))
    finally:
        handle.remove()
    if not seen:
        raise VerificationError(f"the module {path!r} is not called on these inputs")
    return seen[0]
