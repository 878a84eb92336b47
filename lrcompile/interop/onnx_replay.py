"""D of an ONNX graph: a copy in which every linear map's output moves by ±u·(|x||W|), signs drawn from a seed.

The same definition as `lrcompile.verifying.replay`, in the graph's own operators: y' = y + u·s ⊙ f(|x|, |W|, |b|) for
f in MatMul, Gemm, Conv and their like, s = sign of RandomUniformLike. The magnitudes of 4-bit weights are read off the
operator itself by feeding it the identity. What lies in subgraphs or functions is not moved: that makes D smaller,
never larger.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lrcompile.errors import require

if TYPE_CHECKING:
    import onnx

_LINEAR = {"MatMul", "Gemm", "Conv", "ConvTranspose", "FusedMatMul", "TransposeMatMul"}
_PACKED = {"MatMulBnb4", "MatMulNBits"}
_MOST_IDENTITY = 1 << 28  # bytes of one identity matrix


def replayed(model: onnx.ModelProto, roundoff: float, seed: int) -> onnx.ModelProto:
    """The perturbed copy; every value keeps its name."""
    require("onnx", "onnx")
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    added: list[onnx.TensorProto] = [onnx.numpy_helper.from_array(np.array(roundoff, np.float32), "lrcompile_u")]
    names = {"lrcompile_u"}
    nodes: list[onnx.NodeProto] = []
    for index, node in enumerate(model.graph.node):
        kept = onnx.NodeProto()
        kept.CopyFrom(node)
        nodes.append(kept)
        magnitude = _magnitude(kept, f"lrcompile_{index}", nodes, added, names)
        if magnitude is None:
            continue
        result, exact, prefix = kept.output[0], f"lrcompile_{index}_exact", f"lrcompile_{index}"
        kept.output[0] = exact
        make = onnx.helper.make_node
        nodes += [
            make("RandomUniformLike", [magnitude], [f"{prefix}_r"], low=-1.0, high=1.0, dtype=1,
                 seed=float(1 + index + 100_003 * seed)),
            make("Sign", [f"{prefix}_r"], [f"{prefix}_s"]),
            make("Mul", [f"{prefix}_s", "lrcompile_u"], [f"{prefix}_us"]),
            make("CastLike", [f"{prefix}_us", magnitude], [f"{prefix}_c"]),
            make("Mul", [f"{prefix}_c", magnitude], [f"{prefix}_d"]),
            make("Add", [exact, f"{prefix}_d"], [result]),
        ]  # fmt: skip
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(added)
    return copy


def _magnitude(
    node: onnx.NodeProto, prefix: str, nodes: list[onnx.NodeProto], added: list[onnx.TensorProto], names: set[str]
) -> str | None:
    """Add the nodes of f(|x|, |W|, |b|); the name of its value, None for what is no linear map."""
    onnx = require("onnx", "onnx")
    make = onnx.helper.make_node
    settings = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
    if node.domain in ("", "ai.onnx", "com.microsoft") and node.op_type in _LINEAR:
        inputs = [f"{prefix}_abs{at}" if name else "" for at, name in enumerate(node.input)]
        nodes += [make("Abs", [name], [new]) for name, new in zip(node.input, inputs, strict=True) if name]
        positive = {key: abs(value) if isinstance(value, float) else value for key, value in settings.items()}
        nodes.append(make(node.op_type, inputs, [f"{prefix}_m"], domain=node.domain, **positive))
        return f"{prefix}_m"
    if node.domain != "com.microsoft" or node.op_type not in _PACKED:
        return None
    size = int(settings["K"])
    if 4 * size * size > _MOST_IDENTITY:
        return None
    identity = f"lrcompile_eye{size}"
    if identity not in names:
        names.add(identity)
        added.append(onnx.numpy_helper.from_array(np.eye(size, dtype=np.float32), identity))
    rest = list(node.input)[1:]
    if node.op_type == "MatMulNBits" and len(rest) >= 5:
        rest[4] = ""  # its bias
    while rest and not rest[-1]:
        rest.pop()
    nodes += [
        make(node.op_type, [identity, *rest], [f"{prefix}_w"], domain=node.domain, **settings),
        make("Abs", [f"{prefix}_w"], [f"{prefix}_aw"]),
        make("Abs", [node.input[0]], [f"{prefix}_ax"]),
        make("CastLike", [f"{prefix}_aw", f"{prefix}_ax"], [f"{prefix}_cw"]),
        make("MatMul", [f"{prefix}_ax", f"{prefix}_cw"], [f"{prefix}_m"]),
    ]
    return f"{prefix}_m"


def working_roundoff(model: onnx.ModelProto) -> tuple[str, float]:
    """The floating type that holds most of the graph's weights, and its unit roundoff; float32 where there is none."""
    onnx = require("onnx", "onnx")
    kinds = {
        onnx.TensorProto.FLOAT: ("float32", 2.0**-24),
        onnx.TensorProto.FLOAT16: ("float16", 2.0**-11),
        onnx.TensorProto.BFLOAT16: ("bfloat16", 2.0**-8),
        onnx.TensorProto.DOUBLE: ("float64", 2.0**-53),
    }
    counts: dict[int, int] = {}
    for tensor in model.graph.initializer:
        if tensor.data_type in kinds:
            counts[tensor.data_type] = counts.get(tensor.data_type, 0) + int(np.prod(tensor.dims))
    most = max(counts, key=lambda kind: counts[kind]) if counts else onnx.TensorProto.FLOAT
    return kinds[most]
