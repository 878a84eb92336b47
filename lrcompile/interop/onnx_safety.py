"""Check an ONNX file before any runtime sees it. Nothing outside its folder is read, and no size it claims is believed.

Onnxruntime accepts hard links to anywhere, onnx_ir ignores a wrong `length`, and no loader bounds what a small file
expands to; so all of that is settled here, on the structure alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrcompile.errors import VerificationError, require
from lrcompile.interop.onnx_tensors import check_external, check_operator, tensor_bytes

if TYPE_CHECKING:
    import onnx

MAX_OPSET, MAX_IR = 26, 13  # what onnxruntime 1.31 takes; onnx 1.23 by itself writes 28 and 14
MAX_BYTES = 64 << 30
_PROTO_BYTES = (2 << 30) - 1
_MAX_DEPTH = 32

_STANDARD = ("", "ai.onnx")
_CONTRIB = "com.microsoft"
_CONTRIB_NAMES = """
    Attention BiasAdd BiasDropout BiasGelu BiasSoftmax BiasSplitGelu DecoderMaskedMultiHeadAttention
    DequantizeLinear DynamicQuantizeMatMul EmbedLayerNormalization ExpandDims FastGelu FusedConv FusedGemm
    FusedMatMul FusedMatMulActivation GatherBlockQuantized GatherND Gelu GemmFastGelu GroupNorm
    GroupQueryAttention Inverse LinearAttention MatMulBnb4 MatMulInteger16 MatMulIntegerToFloat MatMulNBits MoE
    MultiHeadAttention NhwcConv PackedAttention PackedMultiHeadAttention QAttention QGemm QLinearAdd QLinearMul
    QMoE QuantizeLinear QuickGelu RelativePositionBias RemovePadding RestorePadding RotaryEmbedding
    SimplifiedLayerNormalization SkipGroupNorm SkipLayerNormalization SkipSimplifiedLayerNormalization
    TransposeMatMul Trilu
"""
_CONTRIB_OPERATORS = frozenset(_CONTRIB_NAMES.split())

Functions = dict[tuple[str, str], Any]


def check(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> onnx.ModelProto:
    """The model's structure, external data unread, if every operator is known, every size fits and every file is
    confined.

    Raises `VerificationError` naming the node, tensor or file, for an unknown operator or domain, an opset or IR that
    the runtime refuses, external data that is absolute, above the folder, linked, missing or out of the file's bounds,
    packed sizes that do not fit, and a total of more than `max_bytes`.
    """
    path = Path(path)
    model = _parse(path)
    functions = {(entry.domain, entry.name): entry for entry in model.functions}
    _check_versions(path, model, functions)
    _check_recursion(path, functions)
    budget = _Budget(path, max_bytes)
    for graph in _graphs(path, model.graph):
        _check_graph(path, graph, functions, budget)
    for function in model.functions:
        _check_nodes(path, function.node, {}, functions, budget)
        for node in function.node:
            for graph in _subgraphs(path, node, 0):
                _check_graph(path, graph, functions, budget)
    return model


def _parse(path: Path) -> onnx.ModelProto:
    onnx = require("onnx", "onnx")
    require("google.protobuf.message", "onnx")
    from google.protobuf.message import DecodeError

    try:
        size = path.stat().st_size
        if size > _PROTO_BYTES:
            raise VerificationError(f"{path} has {size} bytes; an ONNX file holds at most 2 GiB, weights go beside it")
        model = onnx.ModelProto()
        model.ParseFromString(path.read_bytes())
    except OSError as error:
        raise VerificationError(f"{path} cannot be read: {error}") from error
    except DecodeError as error:
        raise VerificationError(f"{path} is not an ONNX file, or is truncated: {error}") from error
    if not model.graph.node and not model.graph.output:
        raise VerificationError(f"{path} holds no graph")
    return model


def _check_versions(path: Path, model: onnx.ModelProto, functions: Functions) -> None:
    if not 1 <= model.ir_version <= MAX_IR:
        raise VerificationError(f"{path} has IR version {model.ir_version}; the runtime takes 1 to {MAX_IR}")
    local = {domain for domain, _ in functions}
    for entries in (model.opset_import, *(function.opset_import for function in model.functions)):
        for entry in entries:
            if entry.domain in _STANDARD and not 1 <= entry.version <= MAX_OPSET:
                raise VerificationError(f"{path} uses opset {entry.version}; the runtime takes 1 to {MAX_OPSET}")
            if entry.domain not in (*_STANDARD, _CONTRIB) and entry.domain not in local and _used(model, entry.domain):
                raise VerificationError(
                    f"{path} uses operators of the domain {entry.domain!r}; known are ai.onnx, {_CONTRIB} "
                    "and functions defined in the file"
                )


def _used(model: onnx.ModelProto, domain: str) -> bool:
    return any(node.domain == domain for node in model.graph.node)


def _check_recursion(path: Path, functions: Functions) -> None:
    """Functions that call each other in a circle would be inlined without end."""
    done: set[tuple[str, str]] = set()

    def visit(key: tuple[str, str], above: tuple[tuple[str, str], ...]) -> None:
        if key in above or len(above) > _MAX_DEPTH:
            raise VerificationError(f"{path}: the function {'.'.join(key)} calls itself, or calls nest too deeply")
        if key in done:
            return
        for node in functions[key].node:
            if (node.domain, node.op_type) in functions:
                visit((node.domain, node.op_type), (*above, key))
        done.add(key)

    for key in functions:
        visit(key, ())


def _graphs(path: Path, graph: onnx.GraphProto, depth: int = 0) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        yield from _subgraphs(path, node, depth)


def _subgraphs(path: Path, node: onnx.NodeProto, depth: int) -> Iterator[onnx.GraphProto]:
    if depth > _MAX_DEPTH:
        raise VerificationError(f"{path}: subgraphs nest deeper than {_MAX_DEPTH}")
    for attribute in node.attribute:
        for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            yield from _graphs(path, inner, depth + 1)


@dataclass
class _Budget:
    """Bytes that the file expands to, counted before anything is allocated."""

    path: Path
    limit: int
    spent: int = 0

    def spend(self, amount: int, what: str) -> None:
        self.spent += amount
        if self.spent > self.limit:
            raise VerificationError(f"{self.path}: with {what} the tensors take more than {self.limit} bytes")


def _check_graph(path: Path, graph: onnx.GraphProto, functions: Functions, budget: _Budget) -> None:
    if graph.sparse_initializer:
        raise VerificationError(f"{path} holds sparse initializers, which no exporter of ours writes")
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for tensor in graph.initializer:
        _check_tensor(path, tensor, budget)
    _check_nodes(path, graph.node, tensors, functions, budget)


def _check_nodes(path: Path, nodes: Any, tensors: dict[str, Any], functions: Functions, budget: _Budget) -> None:
    onnx = require("onnx", "onnx")
    for node in nodes:
        standard = node.domain in _STANDARD and onnx.defs.has(node.op_type, "")
        contrib = node.domain == _CONTRIB and node.op_type in _CONTRIB_OPERATORS
        if not (standard or contrib or (node.domain, node.op_type) in functions):
            raise VerificationError(
                f"{path}: node {node.name!r} is {node.domain or 'ai.onnx'}.{node.op_type}, which is not known"
            )
        for attribute in node.attribute:
            for tensor in (*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors):
                _check_tensor(path, tensor, budget)
        budget.spend(check_operator(path, node, tensors), f"node {node.name!r}")


def _check_tensor(path: Path, tensor: onnx.TensorProto, budget: _Budget) -> None:
    onnx = require("onnx", "onnx")
    size = tensor_bytes(path, tensor)
    budget.spend(size, f"tensor {tensor.name!r}")
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        check_external(path, tensor, size)
    elif tensor.HasField("raw_data"):
        if len(tensor.raw_data) != size:
            raise VerificationError(
                f"{path}: tensor {tensor.name!r} holds {len(tensor.raw_data)} bytes, its shape needs {size}"
            )
    elif size > 64 * tensor.ByteSize():  # a value takes a byte at least, and no element type has more than 16
        raise VerificationError(f"{path}: tensor {tensor.name!r} claims {size} bytes and holds {tensor.ByteSize()}")
