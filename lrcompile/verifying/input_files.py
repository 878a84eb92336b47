"""Input sets from a file: `.safetensors`, `.npz`, or the folder of a golden. All are hostile until checked.

An `.npz` is a zip of arrays, so a small file may claim to be huge, and an array may be a pickle: what every member
claims is checked against its header before anything of that size is read, and only plain numbers are taken.
"""

from __future__ import annotations

import math
import os
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lrcompile.errors import VerificationError
from lrcompile.safe_tensors import read_tensors
from lrcompile.verifying.golden_files import MANIFEST, recorded_inputs
from lrcompile.verifying.outputs import Inputs

MAX_BYTES = 1 << 30
_FREE_BYTES, _MAX_RATIO = 64 << 20, 64  # beyond 64 MiB, at most so many times the file's own size
_MAX_MEMBERS = 10_000
_MAX_HEADER = 4096
_MAX_DIMENSIONS = 16
_KINDS = "biufc"
_DTYPES = ("bool", "int8", "int16", "int32", "int64", "uint8", "float16", "float32", "float64", "complex64")
_BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, KeyError, OSError)


def read_inputs(path: str | os.PathLike[str]) -> list[Inputs]:
    """The input sets that `path` holds. Raises `VerificationError` naming the file and the fault."""
    path = Path(path)
    if path.is_dir() and (path / MANIFEST).exists():
        return recorded_inputs(path)
    if not path.is_file():
        raise VerificationError(f"there is no file {path}; inputs come from a .safetensors or .npz file or a golden")
    if path.suffix == ".npz":
        return [_by_name(path, _read_npz(path))]
    if path.suffix == ".safetensors":
        return [_by_name(path, read_tensors(path, VerificationError, MAX_BYTES))]
    raise VerificationError(
        f"{path} ends in {path.suffix!r}; inputs come from a .safetensors or .npz file or the folder of a golden"
    )


def _by_name(path: Path, tensors: dict[str, Tensor]) -> Inputs:
    """Keyword arguments; numpy's own names for unnamed arrays (arr_0, …) are positional ones."""
    if not tensors:
        raise VerificationError(f"{path} holds no tensor; store the model's inputs under the names it takes")
    if set(tensors) == {f"arr_{index}" for index in range(len(tensors))}:
        return tuple(tensors[f"arr_{index}"] for index in range(len(tensors)))
    return tensors


def _read_npz(path: Path) -> dict[str, Tensor]:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            _check_sizes(path, entries)
            found = {entry.filename.removesuffix(".npy"): _member(path, archive, entry) for entry in entries}
    except _BROKEN as error:
        raise VerificationError(f"{path} is not a readable .npz file: {error}") from error
    return found


def _check_sizes(path: Path, entries: list[zipfile.ZipInfo]) -> None:
    names = [entry.filename for entry in entries]
    if len(set(names)) != len(names) or len(names) > _MAX_MEMBERS:
        raise VerificationError(f"{path} holds {len(names)} arrays, some twice or too many of them")
    total, own = sum(entry.file_size for entry in entries), path.stat().st_size
    if total > MAX_BYTES or (total > _FREE_BYTES and total > _MAX_RATIO * own):
        raise VerificationError(
            f"{path} has {own} bytes and claims to expand to {total}; at most {MAX_BYTES} are read, and beyond "
            f"{_FREE_BYTES} at most {_MAX_RATIO} times the file's size"
        )


def _member(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Tensor:
    where = f"{path}: {entry.filename!r}"
    if not entry.filename.endswith(".npy") or entry.flag_bits & 1:
        raise VerificationError(f"{where} is no plain .npy array")
    with archive.open(entry) as handle:
        version = np.lib.format.read_magic(handle)
        if version not in ((1, 0), (2, 0)):
            raise VerificationError(f"{where} is of version {version}; 1.0 and 2.0 are read")
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = reader(handle, max_header_size=_MAX_HEADER)
        if dtype.kind not in _KINDS or dtype.name not in _DTYPES:
            raise VerificationError(f"{where} has dtype {dtype}; plain numbers are read, objects never")
        if len(shape) > _MAX_DIMENSIONS or any(size < 0 for size in shape):
            raise VerificationError(f"{where} has shape {shape}")
        need = math.prod(shape) * dtype.itemsize
        if need > entry.file_size:
            raise VerificationError(f"{where} claims {need} bytes of data in a member of {entry.file_size}")
        data = handle.read(need)
        if len(data) != need or handle.read(1):
            raise VerificationError(f"{where} holds {len(data)} bytes of data or more, its header announces {need}")
    if dtype.kind == "b" and not set(data) <= {0, 1}:
        raise VerificationError(f"{where} holds truth values that are neither 0 nor 1")
    array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
    return torch.from_numpy(array.astype(dtype.newbyteorder("="), order="C"))  # always a copy: `data` is read-only
