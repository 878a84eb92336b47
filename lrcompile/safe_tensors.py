"""Reading a safetensors file that may be hostile: what it claims is checked before anything of that size is allocated.

The layout: 8 bytes little-endian length n, n bytes of JSON `{name: {dtype, shape, data_offsets}}`, then the data
without holes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from lrcompile.errors import AdapterError, LrcompileError, VerificationError
from lrcompile.verifying.strictjson import parse_object
from lrcompile.wording import listed

MAX_BYTES = 16 << 30
MAX_HEADER = 16 << 20
MAX_TENSORS = 100_000
MAX_DIMENSIONS = 8
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INTEGERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
STATE = FLOATS | INTEGERS | {"BOOL": torch.bool}
ANY = STATE | {"C64": torch.complex64}


@dataclass(frozen=True)
class Entry:
    """What the header claims of one tensor, found consistent."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class TensorFile:
    """An open file whose header has been checked."""

    def __init__(
        self, path: Path, handle: BinaryIO, head: bytes, entries: dict[str, Entry], error: type[LrcompileError]
    ):
        self.path, self.entries = path, entries
        self._handle, self._head, self._error = handle, head, error

    def tensors(self, *, finite: bool = True) -> dict[str, Tensor]:
        """All tensors; NaN or infinity in any is an error where `finite` values are wanted."""
        need = sum(math.prod(entry.shape) * entry.dtype.itemsize for entry in self.entries.values())
        data = self._handle.read(need)
        if len(data) != need:
            raise self._error(f"{self.path} is truncated: {need} bytes of data were announced, {len(data)} are there")
        try:
            loaded = load(self._head + data)
        except SafetensorError as cause:
            raise self._error(f"{self.path} is not a valid safetensors file: {cause}") from cause
        odd = [name for name, t in loaded.items() if t.dtype == torch.bool and bool((t.view(torch.uint8) > 1).any())]
        if odd:
            raise self._error(f"{self.path}: {listed(odd)} hold truth values that are neither 0 nor 1")
        broken = [name for name, tensor in loaded.items() if finite and not bool(torch.isfinite(tensor).all())]
        if broken:
            raise self._error(
                f"{self.path}: {listed(broken)} hold NaN or infinite values; the adapter is broken (or was never"
                " trained well)"
            )
        return loaded


@contextmanager
def writing() -> Iterator[None]:
    """A failure to write tensors is an `OSError`, like any other failure to write."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from error


def read_tensors(path: Path, error: type[LrcompileError], most: int = MAX_BYTES) -> dict[str, Tensor]:
    """All tensors of `path`, of whatever dtype and value."""
    with open_tensors(path, error=error, dtypes=ANY, most=most) as file:
        return file.tensors(finite=False)


@contextmanager
def open_tensors(
    path: Path,
    *,
    error: type[LrcompileError] = AdapterError,
    dtypes: Mapping[str, torch.dtype] = FLOATS,
    most: int = MAX_BYTES,
) -> Iterator[TensorFile]:
    """Check header and sizes of `path`, which holds at most so many bytes of these dtypes; `error`, naming the file
    and the fault, if anything in it is not as it should be.
    """
    try:
        with path.open("rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            if size > most:
                raise error(f"{path} has {size} bytes; files above {most} are not read")
            head = handle.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8 or length > size - 8:
                raise error(
                    f"{path} is truncated, or no safetensors file: its header should have {length} bytes, the file"
                    f" has {size}"
                )
            if length > MAX_HEADER:
                raise error(f"{path}: its header has {length} bytes; headers above {MAX_HEADER} are not read")
            text = handle.read(length)
            yield TensorFile(path, handle, head + text, _checked(path, text, size - 8 - length, dtypes, error), error)
    except OSError as cause:
        raise error(f"{path} cannot be read: {cause}") from cause


def _checked(
    path: Path, text: bytes, size: int, dtypes: Mapping[str, torch.dtype], error: type[LrcompileError]
) -> dict[str, Entry]:
    try:
        header = parse_object(text, f"the header of {path}")
    except VerificationError as cause:
        raise error(str(cause)) from cause
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise error(f"{path}: __metadata__ must map strings to strings")
    if len(header) > MAX_TENSORS:
        raise error(f"{path} announces {len(header)} tensors; files with more than {MAX_TENSORS} are not read")
    entries, spans = {}, []
    for name, claim in header.items():
        entries[name], span = _entry(path, name, claim, dtypes, error)
        spans.append((*span, name))
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            raise error(
                f"{path}: the data of {name!r} begins at {start}, {end} was expected (tensors overlap, or leave a hole)"
            )
        end = stop
    if end != size:
        raise error(f"{path} is truncated or padded: its tensors take {end} bytes, the file holds {size} for them")
    return entries


def _entry(
    path: Path, name: str, claim: Any, dtypes: Mapping[str, torch.dtype], error: type[LrcompileError]
) -> tuple[Entry, tuple[int, int]]:
    if not isinstance(claim, dict) or set(claim) != {"dtype", "shape", "data_offsets"}:
        raise error(f"{path}: {name!r} must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = claim["dtype"], claim["shape"], claim["data_offsets"]
    if not isinstance(dtype, str) or dtype not in dtypes:
        raise error(f"{path}: {name!r} has dtype {dtype!r}; expected one of {', '.join(dtypes)}")
    if not _sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise error(f"{path}: {name!r} has shape {shape!r}, at most {MAX_DIMENSIONS} sizes were expected")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * dtypes[dtype].itemsize:
        raise error(f"{path}: {name!r} has data_offsets {offsets!r}, which do not fit {shape} of {dtype}")
    return Entry(dtypes[dtype], tuple(shape)), (offsets[0], offsets[1])


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 62 for value in values)
