"""Write an ONNX model: weights streamed to a data file beside it, and whoever looks sees the old model or the new one.

The data file is named by its content, so it appears beside an old one without touching it; the model that refers to it
is exchanged by one rename. The model is checked, and loaded by ONNX Runtime, before that moment.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import onnx
import onnx_ir as ir
import onnxruntime

from lrcompile.deployment.exchanging import Exchange, exchanging
from lrcompile.errors import ExportError, VerificationError
from lrcompile.interop.onnx_safety import check
from lrcompile.progress import shown
from lrcompile.verifying.manifest import sha256
from lrcompile.writing import temporary_file

EMBEDDED = 64 << 10
"""Bytes of weights that a model may hold itself; more go to the data file."""
_SMALL = 1 << 10  # bytes; runtimes read shapes and axes while loading, before external data
_ALIGNMENT = 64


def write(
    model: ir.Model,
    path: Path,
    session: Mapping[str, Any],
    manifest: dict[str, Any],
    adapters: Mapping[str, Callable[[Path, str], None]] | None = None,
) -> None:
    """Write `path`, its data file, its adapters and its manifest, exchanged as one. `model` is consumed; `manifest`
    gets the sha256 of each file by name.

    `adapters`: by file name, each written to the path it is given, with the sha256 of `path`. Raises ExportError when
    something cannot be written or ONNX Runtime refuses the model; then, as after Ctrl-C, the files are as before.
    """
    external = [value for value in model.graph.initializers.values() if _goes_outside(value)]
    if sum(value.const_value.nbytes for value in external) <= EMBEDDED:  # type: ignore[union-attr, misc]
        external = []
    with exchanging(path) as exchange:
        hashes = _write_data(external, path, exchange)
        new = exchange.model()
        new.write_bytes(_serialized(model, path))
        hashes[path.name] = sha256(new)
        _try(new, session)
        for name, fill in (adapters or {}).items():
            file = exchange.adapter(name)
            fill(file, hashes[path.name])
            hashes[name] = sha256(file)
        manifest["sha256"] = hashes
        exchange.commit(manifest)
    _remove_stale(path, hashes)


def _goes_outside(value: ir.Value) -> bool:
    tensor = value.const_value
    return tensor is not None and tensor.dtype != ir.DataType.STRING and int(tensor.nbytes) >= _SMALL


def _write_data(values: list[ir.Value], path: Path, exchange: Exchange) -> dict[str, str]:
    """Stream the tensors into `<stem>.<hash>.data` and point the values at it."""
    if not values:
        return {}
    with temporary_file(path.with_suffix(".data"), error=ExportError) as temporary:
        with temporary.open("wb") as handle:
            target = _Hashed(handle)
            places = [
                (value, *target.append(value.const_value)) for value in shown(values, "writing weights", len(values))
            ]
        digest = target.digest.hexdigest()
        final = path.with_name(f"{path.stem}.{digest[:12]}.data")
        exchange.add(temporary, final)
    for value, offset, length in places:
        tensor = value.const_value
        assert tensor is not None  # `_goes_outside` chose those that have one
        value.const_value = ir.ExternalTensor(
            final.name, offset, length, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=str(value.name),
            base_dir=path.parent,
        )  # fmt: skip
    return {final.name: digest}


class _Hashed:
    """A file that is hashed while it is written; one tensor at a time is in memory."""

    def __init__(self, handle: BinaryIO):
        self.handle, self.digest, self.position = handle, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.handle.write(view)
        self.digest.update(view)
        self.position += len(view)
        return len(view)

    def append(self, tensor: Any) -> tuple[int, int]:
        self.write(bytes(-self.position % _ALIGNMENT))
        start = self.position
        tensor.tofile(self)
        return start, self.position - start


def _serialized(model: ir.Model, path: Path) -> bytes:
    try:
        return ir.serde.serialize_model(model).SerializeToString()
    except ValueError as error:  # protobuf's limit of 2 GiB, which only a huge graph can reach: weights are outside
        raise ExportError(f"the graph of {path.name} cannot be serialised: {error}") from error


def _try(path: Path, session: Mapping[str, Any]) -> None:
    """Check the file, and load it as a user would, but with the weights mapped instead of copied."""
    state = onnxruntime.capi.onnxruntime_pybind11_state
    refusals: tuple[Any, ...] = tuple(
        kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception)
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    for key, value in {**session.get("config", {}), "session.disable_prepacking": "1"}.items():
        options.add_session_config_entry(key, value)
    try:
        onnx.checker.check_model(str(path))
        check(path)
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except (onnx.checker.ValidationError, VerificationError, *refusals) as error:
        held = onnx.load(path, load_external_data=False).graph.initializer
        hint = any(tensor.data_type == onnx.TensorProto.BFLOAT16 for tensor in held)
        raise ExportError(
            f"the exported model is not one that ONNX Runtime accepts, nothing was written: {error}"
            + (". Its CPU kernels do not take bfloat16: export model.float()" if hint else "")
        ) from error


def _remove_stale(path: Path, hashes: Mapping[str, str]) -> None:
    """Data files of models that were here before under this name."""
    ours = re.compile(re.escape(path.stem) + r"\.[0-9a-f]{12}\.data")
    for entry in path.parent.iterdir():
        if ours.fullmatch(entry.name) and entry.name not in hashes:
            with suppress(OSError):  # the new model is complete; a left-over costs space, not correctness
                entry.unlink()
