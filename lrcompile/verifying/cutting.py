"""Cut the part of a candidate that makes one place's value: a submodule, a piece of a graph, nodes of an ONNX file."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from lrcompile.errors import LrcompileError, VerificationError
from lrcompile.verifying.intermediates import ENTERING, arguments, enclosing, run_graph
from lrcompile.verifying.outputs import Inputs, aligned, copied
from lrcompile.verifying.provenance import graph_scopes
from lrcompile.verifying.replay import Deviation
from lrcompile.verifying.runners import ModuleRunner, PackageRunner, Runner, evaluating


@dataclass(frozen=True)
class Part:
    """`kind` says how it runs, `write` puts its files into a folder; `outputs` are its own names for what it gives."""

    kind: str
    what: str
    write: Callable[[Path], None]
    outputs: list[str]
    options: dict[str, Any] = field(default_factory=dict)


def cut(candidate: Runner, inputs: Inputs, place: str | None, expected: Mapping[str, Deviation]) -> Part:
    """The part of `candidate` behind `place`, with what enters it in a run on `inputs`; all of it for None.

    `expected` has what the part should give, by the reference's names.
    """
    if isinstance(candidate, PackageRunner):
        return _package(candidate, inputs, expected)
    if isinstance(candidate, ModuleRunner):
        return _module(candidate.module, inputs, place, list(expected))
    extract = getattr(candidate, "extract", None)
    if extract is None:
        raise VerificationError(f"{candidate.label} holds outputs only: there is nothing to run, so no repro")
    model, values, names = extract(inputs, place)

    def write(folder: Path) -> None:
        (folder / "model.onnx").write_bytes(model.SerializeToString())
        savez(folder / "inputs.npz", {name: value.numpy() for name, value in values.items()})

    operators = ", ".join(dict.fromkeys(node.op_type for node in model.graph.node))
    return Part("onnx", f"{len(model.graph.node)} ONNX nodes ({operators})", write, names)


def savez(path: Path, arrays: dict[str, Any]) -> None:
    """`np.savez` for arrays of any name."""
    np.savez(path, **arrays)


def _package(candidate: PackageRunner, inputs: Inputs, expected: Mapping[str, Deviation]) -> Part:
    named = inputs if isinstance(inputs, dict) else {f"input_{index}": value for index, value in enumerate(inputs)}
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    if len(tensors) != len(named):
        raise VerificationError(f"the inputs of {candidate.label} are not all tensors, so no repro could hold them")

    def write(folder: Path) -> None:
        shutil.copyfile(candidate.path, folder / "model.pt2")
        savez(folder / "inputs.npz", {name: value.cpu().numpy() for name, value in tensors.items()})

    theirs = {name: torch.tensor(index) for index, name in enumerate(candidate.run(inputs))}
    found = aligned({name: bound.exact for name, bound in expected.items()}, theirs, candidate.label)
    places = {name: int(index) for name, index in found.items()}
    options = {"positional": not isinstance(inputs, dict), "outputs": places}
    return Part("package", "the whole package", write, [], options)


def _module(module: nn.Module, inputs: Inputs, place: str | None, outputs: list[str]) -> Part:
    module = getattr(module, "_orig_mod", module)
    piece: nn.Module
    if isinstance(module, fx.GraphModule) and place is not None:
        piece, args, kwargs = _piece(module, inputs, place)
        what = "a piece of the graph"
    else:
        path = enclosing(place or "")
        piece, (args, kwargs) = module.get_submodule(path), arguments(module, inputs, path)
        what = f"the module {path or type(module).__name__}"
    program = _captured(piece, args, kwargs)
    names = ["value"] if place is not None else outputs

    def write(folder: Path) -> None:
        torch.export.save(program, folder / "model.pt2")

    return Part("program", what, write, names)


def _captured(piece: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.export.ExportedProgram:
    """The piece in plain aten: no operator of ours is left that another process would not know."""
    from lrcompile import passes
    from lrcompile.int8.modules import plain_weights
    from lrcompile.passes.base import Program

    try:
        with evaluating(piece), plain_weights(piece), torch.no_grad():
            program = Program(torch.export.export(piece, args, kwargs, strict=False), piece)
            passes.parse("expand-nf4").run(program)
            program.compute()
            return program.exported.run_decompositions()
    except (RuntimeError, ValueError, TypeError, AssertionError, LrcompileError) as error:
        raise VerificationError(f"the diverging part cannot be captured, so no repro was written: {error}") from error


def _piece(
    module: fx.GraphModule, inputs: Inputs, place: str
) -> tuple[fx.GraphModule, tuple[Tensor, ...], dict[str, Any]]:
    """The nodes between the place's value and what enters it, as a graph of its own."""
    scopes = graph_scopes(module.graph)
    nodes = {node.name: node for node in module.graph.nodes}
    scope = place.removeprefix(ENTERING)
    made = next(iter((scopes.entering if place.startswith(ENTERING) else scopes.leaving).get(scope, [])), None)
    if made is None or made not in scopes.makers:
        raise VerificationError(f"{place} has no node of its own in the graph, so no repro")
    ends = set(scopes.entering.get(scope, ())) - {made} if not place.startswith(ENTERING) else set()
    ends |= {values[0] for key, values in scopes.leaving.items() if place.startswith(ENTERING) and key[:1] != "%"}
    ends -= {made}
    with torch.no_grad():
        values = run_graph(module, copied(inputs), {name: name for name in scopes.makers})
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}

    def build(node: fx.Node) -> fx.Node:
        if node in copies:
            return copies[node]
        if node.op == "placeholder" or (node.name in ends and node.name in values):
            copies[node] = graph.placeholder(node.name)
        else:
            for used in node.all_input_nodes:
                build(used)
            copies[node] = graph.node_copy(node, lambda used: copies[used])
        return copies[node]

    graph.output(build(nodes[made]))
    # placeholders first, as a graph wants them
    holders = [node for node in graph.nodes if node.op == "placeholder"]
    for node in reversed(holders):
        first = next(iter(graph.nodes))
        if node is not first:
            first.prepend(node)
    placed = [node.name for node in module.graph.nodes if node.op == "placeholder"]
    bound = dict(zip(placed, pytree.tree_leaves(copied(inputs)), strict=False))
    bound |= {name: inputs[name] for name in placed if isinstance(inputs, dict) and name in inputs}
    args = tuple(values[node.target] if node.target in values else bound[node.target] for node in holders)
    return fx.GraphModule(module, graph), args, {}
