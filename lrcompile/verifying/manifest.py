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
class Artefact:
    """What the manifest says; `stale` has a sentence for each file that is no longer the one it describes."""

    limits: Limits | None = None
    session: dict[str, Any] = field(default_factory=dict)
    stale: tuple[str, ...] = ()


def artefact(candidate: Any) -> Artefact:
    """The manifest of a candidate, empty if it is no file or has none."""
    if not isinstance(candidate, str | os.PathLike):
        return Artefact()
    manifest, data = Path(candidate).with_suffix(".manifest.json"), described(candidate)
    if not data:
        return Artefact()
    session, hashes = data.get("session", {}), data.get("sha256", {})
    if not isinstance(session, dict) or not isinstance(hashes, dict):
        raise VerificationError(f"{manifest}: session and sha256 must be objects")
    limits = Limits.from_dict(data["limits"]) if "limits" in data else None
    return Artefact(limits, session, tuple(_stale(manifest, hashes)))


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
