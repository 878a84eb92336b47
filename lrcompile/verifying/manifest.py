"""The manifest beside an artefact of ours (`model.manifest.json` beside `model.onnx`): its limits, session settings
and hashes.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lrcompile.errors import VerificationError
from lrcompile.verifying.strictjson import read_object
from lrcompile.verifying.verdict import Limits


@dataclass(frozen=True)
class Port:
    """An input of the file; sizes that vary have names."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Artefact:
    """What the manifest says, and all of its `data`; `stale` has a sentence for each file of the model that is not the
    one it describes any more. (Adapters beside the model are looked at when they are loaded.)
    """

    limits: Limits | None = None
    session: dict[str, Any] = field(default_factory=dict)
    stale: tuple[str, ...] = ()
    generation: dict[str, Any] | None = None
    """Of a decoder with a cache: what generating with it takes to know."""
    inputs: tuple[Port, ...] = ()
    data: dict[str, Any] = field(default_factory=dict)


NONE = Artefact()


def artefact(candidate: Any) -> Artefact:
    """The manifest of a candidate, empty if it is no file or has none."""
    if not isinstance(candidate, str | os.PathLike):
        return NONE
    manifest, data = Path(candidate).with_suffix(".manifest.json"), described(candidate)
    if not data:
        return NONE
    session, hashes = data.get("session", {}), data.get("sha256", {})
    if not isinstance(session, dict) or not isinstance(hashes, dict):
        raise VerificationError(f"{manifest}: session and sha256 must be objects")
    limits = Limits.from_dict(data["limits"]) if "limits" in data else None
    own = {name: digest for name, digest in hashes.items() if not name.endswith(".onnx_adapter")}
    generation, inputs = data.get("generation"), data.get("inputs", [])
    if not isinstance(generation, dict | None) or not isinstance(inputs, list):
        raise VerificationError(f"{manifest}: generation must be an object and inputs a list")
    ports = tuple(_port(manifest, entry) for entry in inputs)
    return Artefact(limits, session, tuple(_stale(manifest, own)), generation, ports, data)


def _port(manifest: Path, entry: Any) -> Port:
    try:
        port = Port(str(entry["name"]), str(entry["dtype"]), tuple(entry["shape"]))
    except (TypeError, KeyError) as error:
        raise VerificationError(f"{manifest}: an input is not a name, a dtype and a shape") from error
    if not all(isinstance(size, str) or (type(size) is int and 0 <= size < 2**31) for size in port.shape):
        raise VerificationError(f"{manifest}: input {port.name!r} has the shape {list(port.shape)}")
    return port


def described(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest beside `path` as it stands; empty if there is none."""
    manifest = Path(path).with_suffix(".manifest.json")
    return read_object(manifest, schema=1) if manifest.is_file() else {}


def _stale(manifest: Path, hashes: dict[str, Any]) -> list[str]:
    reasons = []
    for name, expected in hashes.items():
        if Path(name).name != name:
            raise VerificationError(f"{manifest} names the file {name!r}; only files beside it can belong to it")
        path = manifest.with_name(name)
        if not path.is_file():
            reasons.append(f"{name} is missing, {manifest.name} lists it")
        elif sha256(path) != expected:
            reasons.append(
                f"{name} is not the file {manifest.name} describes (sha256 differs); its limits may not apply"
            )
    return reasons


def sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
