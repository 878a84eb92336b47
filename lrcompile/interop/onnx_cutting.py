"""A piece of an ONNX graph as a model of its own: from given values back to where they enter, weights inside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from lrcompile.errors import VerificationError, require

if TYPE_CHECKING:
    import onnx

_MOST = (2 << 30) - (1 << 20)  # what one ONNX file may hold


def part(
    path: Path, model: onnx.ModelProto, targets: Iterable[str], ends: set[str], values: Mapping[str, Tensor]
) -> tuple[onnx.ModelProto, list[str]]:
    """The nodes that make `targets` from `ends` and the graph's inputs, and the names of those that it then takes.

    `model` is the checked structure of `path`, so external data lies beside it. `values` gives each input's type and
    shape. Raises `VerificationError` for a piece beyond ONNX's 2 GiB.
    """
    require("onnx", "onnx")
    import onnx

    made = {name: node for node in model.graph.node for name in node.output if name}
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    targets = list(targets)
    needed: set[int] = set()
    entering: dict[str, None] = {}
    weights: dict[str, onnx.TensorProto] = {}
    open_names = list(targets)
    while open_names:
        name = open_names.pop()
        if name in held:
            weights[name] = held[name]
        elif name not in targets and name in ends and name in values:
            entering[name] = None
        elif name in made:
            node = made[name]
            if id(node) not in needed:
                needed.add(id(node))
                open_names += [used for used in (*node.input, *_outer(node)) if used]
        elif name in values:
            entering[name] = None
    piece = onnx.ModelProto()
    piece.CopyFrom(model)
    graph = piece.graph
    for field in ("node", "initializer", "input", "output", "value_info"):
        graph.ClearField(field)
    graph.node.extend(node for node in model.graph.node if id(node) in needed)
    for tensor in weights.values():
        graph.initializer.add().CopyFrom(tensor)
    for tensor in graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            onnx.external_data_helper.load_external_data_for_tensor(tensor, str(path.parent.resolve()))
            tensor.data_location = onnx.TensorProto.DEFAULT
            tensor.ClearField("external_data")
    order = [name for name in values if name in entering]
    for name in order:
        value = values[name].numpy()
        kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
        graph.input.append(onnx.helper.make_tensor_value_info(name, kind, value.shape))
    known = {entry.name: entry for entry in (*model.graph.value_info, *model.graph.output)}
    graph.output.extend(known.get(name) or onnx.ValueInfoProto(name=name) for name in targets)
    if piece.ByteSize() > _MOST:
        raise VerificationError(f"the diverging part of {path} is larger than one ONNX file can be; no repro")
    return piece, order


def _outer(node: onnx.NodeProto) -> list[str]:
    """Names that a node's subgraphs read; those they make themselves do no harm."""
    inner = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    return [name for graph in inner for each in graph.node for name in (*each.input, *_outer(each))]
