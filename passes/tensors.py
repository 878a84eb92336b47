"""Surgery on a `torch.export` program: which tensor a node stands for, and new ones where a rewrite needs them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

aten = torch.ops.aten

VIEWS = {
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.numpy_T.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.narrow.default,
    aten.view.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.alias.default,
    aten.detach.default,
}
"""Ops whose result shares the storage of their first argument: writing through a chain of them changes that too."""
CASTS = {aten.to.dtype, aten._to_copy.default}
RESHAPES = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default}


@dataclass(frozen=True)
class View:
    """A chain of views of one held tensor, and casts of them, innermost first."""

    source: fx.Node
    steps: tuple[fx.Node, ...]

    def key(self) -> tuple[Any, ...]:
        """Equal for chains that view the same part of the same tensor in the same way."""
        return (self.source, *((step.target, repr(step.args[1:]), repr(step.kwargs)) for step in self.steps))

    def of(self, tensor: Tensor) -> Tensor:
        """The part of `tensor` that is read, as a view of it and in its own dtype."""
        for step in self.steps:
            if step.target not in CASTS:
                tensor = step.target(tensor, *step.args[1:], **step.kwargs)  # type: ignore[operator]
        return tensor

    def rebuilt(self, node: fx.Node) -> fx.Node:
        """The same chain on another tensor's node, at the graph's insertion point."""
        for step in self.steps:
            value = step.target(node.meta["val"], *step.args[1:], **step.kwargs)  # type: ignore[operator]
            node = node.graph.call_function(step.target, (node, *step.args[1:]), dict(step.kwargs))  # type: ignore[arg-type]
            node.meta = {**step.meta, "val": value}
        return node


class Tensors:
    """The tensors a program holds (parameters, buffers, lifted constants), by the placeholder that stands for each."""

    def __init__(self, program: ExportedProgram):
        self.program = program
        signature = program.graph_signature
        held = {InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR}
        self.targets = {spec.arg.name: spec.target for spec in signature.input_specs if spec.kind in held}

    def target(self, node: Any) -> str | None:
        """The name (FQN) of the tensor a node stands for; None for anything computed or fed."""
        return self.targets.get(node.name) if isinstance(node, fx.Node) and node.op == "placeholder" else None

    def get(self, node: fx.Node) -> Tensor:
        target = self.targets[node.name]
        state, constants = self.program.state_dict, self.program.constants
        return (state[target] if target in state else constants[target]).detach()

    def view(self, node: Any) -> View | None:
        """The chain of views that leads from a held tensor to `node`, or None."""
        steps: list[fx.Node] = []
        while isinstance(node, fx.Node) and node.op == "call_function" and node.target in VIEWS | CASTS:
            if any(isinstance(each, fx.Node) for each in node.args[1:]):
                return None
            steps.append(node)
            node = node.args[0]
        return View(node, tuple(reversed(steps))) if self.target(node) is not None else None

    def value(self, node: Any) -> Tensor | None:
        """What a node computes from held tensors alone (factors and scales), or None if an input takes part."""
        if not isinstance(node, fx.Node):
            return node
        if self.target(node) is not None:
            return self.get(node)
        if node.op != "call_function":
            return None
        inputs = {each: self.value(each) for each in node.all_input_nodes}
        if any(value is None for value in inputs.values()):
            return None
        args: Any = fx.node.map_arg(node.args, inputs.__getitem__)
        kwargs: Any = fx.node.map_arg(node.kwargs, inputs.__getitem__)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def add(self, name: str, tensor: Tensor, before: fx.Node) -> fx.Node:
        """A new tensor `name` (`name_2`, … if taken) of the program, its placeholder in front of the placeholder
        `before`.
        """
        program, wanted = self.program, name
        for number in itertools.count(2):
            if name not in program.state_dict and name not in program.constants:
                break
            name = f"{wanted}_{number}"
        with program.graph.inserting_before(before):
            node = program.graph.placeholder(f"lrcompile_{name.replace('.', '_')}")
        mode = next(n.meta["val"].fake_mode for n in program.graph.nodes if isinstance(n.meta.get("val"), Tensor))
        node.meta["val"] = mode.from_tensor(tensor, static_shapes=True)
        specs = program.graph_signature.input_specs
        index = next(i for i, spec in enumerate(specs) if spec.arg.name == before.name)
        specs.insert(index, InputSpec(InputKind.BUFFER, TensorArgument(node.name), name, persistent=True))
        program.state_dict[name] = tensor
        self.targets[node.name] = name
        return node


def substitute(program: ExportedProgram, node: fx.Node, other: fx.Node) -> None:
    """Put `other` in the place of `node`, among the program's outputs too, which its signature knows by name."""
    node.replace_all_uses_with(other)
    for spec in program.graph_signature.output_specs:
        if isinstance(spec.arg, TensorArgument) and spec.arg.name == node.name:
            spec.arg = TensorArgument(other.name)
    program.graph.erase_node(node)
