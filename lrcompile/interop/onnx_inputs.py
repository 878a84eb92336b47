"""Tensors of an ONNX graph as inputs that have a default: given to it when it runs, by name, or left alone.

They become inputs before anything is folded and get their defaults after that, so no value of theirs is in the graph.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor

from lrcompile.deployment.swapping import GraphInput
from lrcompile.errors import ExportError

Opened = list[tuple[ir.Value, ir.TensorProtocol]]


def open_inputs(model: ir.Model, inputs: Iterable[GraphInput]) -> Opened:
    """Turn the initializers that `inputs` name into inputs of the graph; returns them with what they will hold."""
    opened = []
    for each in inputs:
        value = model.graph.initializers.pop(each.held)
        default = value.const_value
        assert default is not None  # an initializer has one
        value.name, value.const_value, value.shape = each.name, None, ir.Shape(each.shape)
        model.graph.inputs.append(value)
        if any(isinstance(size, str) for size in each.shape):
            _forget_rank(value)
            empty = torch.zeros([0 if isinstance(size, str) else size for size in each.shape], dtype=each.dtype)
            default = TorchTensor(empty, name=each.name)
        opened.append((value, default))
    return opened


def give_defaults(model: ir.Model, opened: Opened) -> None:
    for value, default in opened:
        if not value.is_graph_input() or not value.uses():
            raise ExportError(
                f"the captured model reads {value.name} and its ONNX graph does not, so an adapter could not change it"
                " there; give adapters='inline' or 'merge'"
            )
        value.const_value = default
        model.graph.initializers[str(value.name)] = value


def _forget_rank(value: ir.Value) -> None:
    """Drop the captured shapes that a rank shows in: all from the input to the sum that adds the update."""
    waiting = [value]
    while waiting:
        for node, _ in waiting.pop().uses():
            if node.op_type == "Add":
                continue
            for output in node.outputs:
                if output.shape is not None:
                    output.shape = None
                    waiting.append(output)
