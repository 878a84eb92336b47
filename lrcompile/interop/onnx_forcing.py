"""A graph that goes on with given values in the place of its own: what each of its parts makes of them shows there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lrcompile.errors import require

if TYPE_CHECKING:
    import onnx


def forced(model: onnx.ModelProto, given: Mapping[str, Any]) -> tuple[onnx.ModelProto, dict[str, str]]:
    """A copy in which each value that `given` names is an input of the type and shape of its array, and what the graph
    itself makes at that place an output; returns it with the names of these outputs, by the value's.
    """
    onnx = require("onnx", "onnx")
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    own = {name: f"lrcompile_own_{index}" for index, name in enumerate(given)}
    for node in graph.node:
        for index, name in enumerate(node.output):
            node.output[index] = own.get(name, name)
    for field in (graph.value_info, graph.output):
        kept = [entry for entry in field if entry.name not in own]
        del field[:]
        field.extend(kept)
    for name, array in given.items():
        kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        graph.input.append(onnx.helper.make_tensor_value_info(name, kind, array.shape))
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in own.values())
    return copy, own
