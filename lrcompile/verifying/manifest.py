"""The manifest beside an artefact of ours (`model.manifest.json` beside `model.onnx`): its limits, session settings
and hashes; and, of an export that was killed, which of two manifests holds (`deployment/exchanging.py` writes them).
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

SCHEMA = 1
REPLACES = "replaces"
"""The key under which a manifest holds the one it replaces, as long as the model is not exchanged."""


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
    manifest, data = manifest_of(candidate), described(candidate)
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
    stale = _stale(manifest, own)
    if own and Path(candidate).name not in own:
        stale.append(f"{manifest.name} describes {', '.join(own)}, not {Path(candidate).name}")
    return Artefact(limits, session, tuple(stale), generation, ports, data)


def _port(manifest: Path, entry: Any) -> Port:
    try:
        port = Port(str(entry["name"]), str(entry["dtype"]), tuple(entry["shape"]))
    except (TypeError, KeyError) as error:
        raise VerificationError(f"{manifest}: an input is not a name, a dtype and a shape") from error
    if not all(isinstance(size, str) or (type(size) is int and 0 <= size < 2**31) for size in port.shape):
        raise VerificationError(f"{manifest}: input {port.name!r} has the shape {list(port.shape)}")
    return port


def manifest_of(path: str | os.PathLike[str]) -> Path:
    """`m.manifest.json` of m.onnx, `m.pt2.manifest.json` of m.pt2: one folder may hold both."""
    path = Path(path)
    return path.with_suffix(".manifest.json" if path.suffix == ".onnx" else f"{path.suffix}.manifest.json")


def described(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What the manifest beside `path` says of it as it stands; empty if there is none."""
    return both_described(path)[0]


def both_described(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The manifest that holds, and another one: after an interrupted export there is the one that was to be replaced
    too, and it holds if the model is still the old one.
    """
    path, manifest = Path(path), manifest_of(path)
    data = read_object(manifest, schema=SCHEMA) if manifest.is_file() else {}
    replaced = data.pop(REPLACES, {})
    if not isinstance(replaced, dict) or replaced.get("schema", SCHEMA) != SCHEMA:
        raise VerificationError(f"{manifest}: what it replaces is no manifest of schema {SCHEMA}")
    if replaced and path.is_file():
        found = sha256(path)
        if found != _listed(data, path.name) and found == _listed(replaced, path.name):
            return replaced, data
    return data, replaced


def _listed(data: dict[str, Any], name: str) -> Any:
    hashes = data.get("sha256")
    return hashes.get(name) if isinstance(hashes, dict) else None


def waiting(path: Path, digest: str) -> Path:
    """Where a file with this sha256 waits until it is put at `path`: a hidden name beside it that its content gives."""
    return path.with_name(f".{path.stem}.{digest[:12]}{path.suffix}")


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
