"""How many bytes ONNX tensors and operators claim, and whether the files they lie in are the model's own."""

from __future__ import annotations

import math
import os
import stat
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrcompile.errors import VerificationError, require

if TYPE_CHECKING:
    import onnx

_EXTERNAL_KEYS = {"location", "offset", "length", "checksum"}
_MAX_ELEMENTS = 1 << 48
_BLOCK_SIZES = (16, 32, 64, 128, 256)
_SHAPED_BY_INPUT = {"ConstantOfShape": 0, "Expand": 1}
_MAX_RANK = 16
_WIDEST = 16  # bytes of a complex128


def tensor_bytes(path: Path, tensor: onnx.TensorProto) -> int:
    """The bytes that the tensor's shape and element type take, packed types packed."""
    onnx = require("onnx", "onnx")
    if any(size < 0 for size in tensor.dims) or math.prod(tensor.dims) > _MAX_ELEMENTS:
        raise VerificationError(f"{path}: tensor {tensor.name!r} has the shape {list(tensor.dims)}")
    elements, kind = math.prod(tensor.dims), tensor.data_type
    if kind == onnx.TensorProto.STRING:
        if tensor.data_location == onnx.TensorProto.EXTERNAL or elements != len(tensor.string_data):
            raise VerificationError(f"{path}: tensor {tensor.name!r} of strings does not hold what its shape says")
        return sum(map(len, tensor.string_data))
    name = onnx.TensorProto.DataType.Name(kind) if kind in onnx.TensorProto.DataType.values() else str(kind)
    if name.endswith("INT4") or name == "FLOAT4E2M1":
        return (elements + 1) // 2
    if name.endswith("INT2"):
        return (elements + 3) // 4
    try:
        return elements * onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize
    except (KeyError, ValueError) as error:
        raise VerificationError(f"{path}: tensor {tensor.name!r} has the unknown element type {name}") from error


def check_operator(path: Path, node: onnx.NodeProto, tensors: dict[str, Any]) -> int:
    """Bytes beyond its inputs that a node is known to allocate; refuses packed weights whose sizes do not fit."""
    if node.op_type == "MatMulBnb4":
        return _matmul_bnb4(path, node, tensors)
    if node.op_type == "MatMulNBits":
        return _matmul_nbits(path, node, tensors)
    index = _SHAPED_BY_INPUT.get(node.op_type)
    if index is None or len(node.input) <= index or node.input[index] not in tensors:
        return 0
    sizes = _integers(path, tensors[node.input[index]])
    return _WIDEST * math.prod(max(size, 0) for size in sizes)


def _integers(path: Path, shape: onnx.TensorProto) -> list[int]:
    """The values of a shape; external ones are read from the file that was confined and measured before."""
    onnx = require("onnx", "onnx")
    if len(shape.dims) != 1 or shape.dims[0] > _MAX_RANK or shape.data_type != onnx.TensorProto.INT64:
        raise VerificationError(f"{path}: {shape.name!r} serves as a shape and is no short vector of int64")
    if shape.data_location != onnx.TensorProto.EXTERNAL:
        return [int(size) for size in onnx.numpy_helper.to_array(shape)]
    given = {entry.key: entry.value for entry in shape.external_data}
    with (path.parent / given["location"]).open("rb") as handle:
        handle.seek(int(given.get("offset", "0")))
        return list(struct.unpack(f"<{shape.dims[0]}q", handle.read(8 * shape.dims[0])))


def _matmul_bnb4(path: Path, node: onnx.NodeProto, tensors: dict[str, Any]) -> int:
    """MatMulBnb4 checks its packed sizes only when it runs, and is wrong on the CPU for transB = 0."""
    given = {attribute.name: attribute.i for attribute in node.attribute}
    rows, columns, block = given.get("N", 0), given.get("K", 0), given.get("block_size", 0)
    where = f"{path}: node {node.name!r} (MatMulBnb4)"
    if not (rows > 0 and columns > 0 and rows * columns < 2**31):
        raise VerificationError(f"{where} has N = {rows}, K = {columns}; N·K must lie between 1 and 2³¹ - 1")
    if block not in _BLOCK_SIZES or given.get("quant_type", 0) not in (0, 1) or given.get("transB", 1) != 1:
        raise VerificationError(f"{where} needs a block size of {_BLOCK_SIZES}, quant_type 0 or 1, and transB = 1")
    _require_counts(where, node, tensors, {1: (rows * columns + 1) // 2, 2: -(-rows * columns // block)})
    return 4 * rows * columns


def _matmul_nbits(path: Path, node: onnx.NodeProto, tensors: dict[str, Any]) -> int:
    """MatMulNBits decodes its whole weight in some of its kernels, whatever the packed sizes are."""
    given = {attribute.name: attribute.i for attribute in node.attribute}
    rows, columns, block, bits = given.get("N", 0), given.get("K", 0), given.get("block_size", 0), given.get("bits", 4)
    where = f"{path}: node {node.name!r} (MatMulNBits)"
    if not (rows > 0 and columns > 0 and rows * columns < 2**31):
        raise VerificationError(f"{where} has N = {rows}, K = {columns}; N·K must lie between 1 and 2³¹ - 1")
    if block not in _BLOCK_SIZES or bits not in (2, 4, 8):
        raise VerificationError(f"{where} needs a block size of {_BLOCK_SIZES} and 2, 4 or 8 bits")
    blocks = rows * -(-columns // block)
    _require_counts(where, node, tensors, {1: blocks * block * bits // 8, 2: blocks})
    return 4 * rows * columns


def _require_counts(where: str, node: onnx.NodeProto, tensors: dict[str, Any], wanted: dict[int, int]) -> None:
    """Do the inputs at these places, where they are held tensors, have so many elements?"""
    for index, count in wanted.items():
        tensor = tensors.get(node.input[index]) if len(node.input) > index else None
        if tensor is not None and math.prod(tensor.dims) != count:
            raise VerificationError(
                f"{where}: {tensor.name!r} has {math.prod(tensor.dims)} elements, {count} are needed"
            )


def check_external(path: Path, tensor: onnx.TensorProto, size: int) -> None:
    keys = [entry.key for entry in tensor.external_data]
    if len(set(keys)) != len(keys) or not {"location"} <= set(keys) <= _EXTERNAL_KEYS:
        raise VerificationError(
            f"{path}: tensor {tensor.name!r} has external-data keys {keys}; "
            f"known are {', '.join(sorted(_EXTERNAL_KEYS))}"
        )
    given = {entry.key: entry.value for entry in tensor.external_data}
    held = confined(path, given["location"])
    try:
        offset, length = int(given.get("offset", "0")), int(given.get("length", str(size)))
    except ValueError as error:
        raise VerificationError(
            f"{path}: tensor {tensor.name!r} has an offset or length that is no number ({error})"
        ) from error
    if length != size or offset < 0 or offset + length > held:
        raise VerificationError(
            f"{path}: tensor {tensor.name!r} needs {size} bytes; it claims {length} at {offset} "
            f"of {given['location']}, which has {held}"
        )


def confined(path: Path, location: str) -> int:
    """The size of the file `location` beside `path`: relative, below the folder, and no link of any kind on the way."""
    parts = location.replace("\\", "/").split("/")
    if not location or os.path.isabs(location) or any(part in ("", "..", ".") for part in parts) or "\0" in location:
        raise VerificationError(
            f"{path}: external data at {location!r}; only a plain path below the model's folder is taken"
        )
    current = path.parent
    for index, part in enumerate(parts):
        current = current / part
        try:
            entry = current.lstat()
        except OSError as error:
            raise VerificationError(f"{path}: external data {location!r} is missing or unreadable ({error})") from error
        last = index == len(parts) - 1
        if not (stat.S_ISREG(entry.st_mode) if last else stat.S_ISDIR(entry.st_mode)):
            raise VerificationError(f"{path}: external data {location!r} is a link or no regular file")
        if last and entry.st_nlink != 1:
            raise VerificationError(
                f"{path}: external data {location!r} is hard-linked elsewhere; copy it to a file of its own"
            )
    return entry.st_size
