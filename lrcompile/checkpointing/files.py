"""The files of one adapter: PEFT's two, and `lrcompile.json` beside them for what PEFT has no words for.

`lrcompile.json` is a file of its own because PEFT warns at, and its older versions refuse, a setting they do not
know. It carries the hash of the `adapter_config.json` it was written with: when something else has rewritten that
since (PEFT, saving into the same folder; a hand that changed the scale), the config is the truth and `lrcompile.json`
is not read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialized
from torch import Tensor

from lrcompile import __version__
from lrcompile.errors import AdapterError, LrcompileError, SpecError, VerificationError
from lrcompile.safe_tensors import FLOATS, STATE, TensorFile, open_tensors
from lrcompile.specs import Spec
from lrcompile.verifying.strictjson import parse_object

CONFIG, WEIGHTS, PICKLED, OURS = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "lrcompile.json",
)
FILES = frozenset((CONFIG, WEIGHTS, PICKLED, OURS))
"""What saving an adapter replaces; every other entry of its folder stays."""
OWN = "LRCOMPILE"
"""The `peft_type` of our own layout."""
_SCHEMA = 1
_MAX_JSON = 64 << 20


@dataclass(frozen=True)
class Content:
    """What a folder is to hold of one adapter."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    aliases: dict[str, str] = field(default_factory=dict)
    """By key of a shared tensor: the key it is written under."""


@dataclass(frozen=True)
class Checkpoint:
    """An adapter folder, opened: settings read and checked, tensors announced but not read yet."""

    folder: Path
    config: dict[str, Any]
    spec: Spec | None
    """The exact spec, if lrcompile wrote this folder."""
    base: dict[str, Any] | None
    """What the adapter was trained on, if that is recorded."""
    tensors: TensorFile
    notes: tuple[str, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)

    @property
    def own(self) -> bool:
        """Is this our own layout?"""
        return self.config.get("peft_type") == OWN


def write(folder: Path, content: Content, spec: Spec, base: Mapping[str, Any]) -> None:
    """Write the files of one adapter into `folder`, which exists and is not looked at by anybody yet."""
    text = json.dumps(content.config, indent=2, sort_keys=True, allow_nan=False).encode()
    weights = serialized(dict(content.tensors), metadata={"format": "pt"})
    ours = {
        "schema": _SCHEMA,
        "version": __version__,
        "config_sha256": _sha256(text),
        "weights_sha256": _sha256(weights),
        "spec": spec.to_dict(),
        "base": base,
    }
    if content.aliases:
        ours["aliases"] = content.aliases
    (folder / CONFIG).write_bytes(text)
    (folder / OURS).write_text(json.dumps(sealed(ours), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    (folder / WEIGHTS).write_bytes(weights)


def sealed(ours: Mapping[str, Any]) -> dict[str, Any]:
    """With the hash of all else in it."""
    rest = {key: value for key, value in ours.items() if key != "sha256"}
    return rest | {"sha256": _sha256(json.dumps(rest, sort_keys=True, allow_nan=False).encode())}


@contextmanager
def opened(folder: Path) -> Iterator[Checkpoint]:
    """The adapter in `folder`; `AdapterError` naming the file at fault. Nothing is ever unpickled."""
    _require_files(folder)
    text = _read(folder / CONFIG)
    config = _parsed(text, folder / CONFIG)
    spec = base = None
    aliases: dict[str, str] = {}
    notes = []
    if (folder / OURS).exists():
        ours = _ours(folder / OURS)
        if ours["config_sha256"] == _sha256(text):
            _require_unchanged(folder / WEIGHTS, ours["weights_sha256"])
            spec, base, aliases = _spec(ours["spec"], folder / OURS), ours["base"], ours.get("aliases", {})
        else:
            notes.append(
                f"{folder / OURS} was written with another {CONFIG} than the one beside it, so it was not used"
            )
    with open_tensors(folder / WEIGHTS, dtypes=STATE if config.get("peft_type") == OWN else FLOATS) as tensors:
        yield Checkpoint(folder, config, spec, base, tensors, tuple(notes), aliases)


def _require_files(folder: Path) -> None:
    if not folder.is_dir():
        raise AdapterError(f"{folder} is no folder; give the one that holds {CONFIG} and {WEIGHTS}")
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if WEIGHTS in missing and (folder / PICKLED).exists():
        raise AdapterError(
            f"{folder} holds its weights as {PICKLED}, a pickle, which could run any code when opened, so it is not"
            " read; load it with PEFT"
            f" where you trust it and call save_pretrained, which writes {WEIGHTS}"
        )
    if missing:
        below = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
        hint = f"; there are adapters in its sub-folders {', '.join(below)}" if below else ""
        raise AdapterError(f"{folder} has no {' and no '.join(missing)}{hint}")


def _ours(path: Path) -> dict[str, Any]:
    data = _parsed(_read(path), path)
    expected = {"schema", "version", "config_sha256", "weights_sha256", "spec", "base", "sha256"}
    if type(data.get("schema")) is not int or data["schema"] != _SCHEMA:
        raise AdapterError(f"{path} has schema {data.get('schema')!r}; this version reads schema {_SCHEMA}")
    if odd := sorted((set(data) - {"aliases"}) ^ expected):
        raise AdapterError(
            f"{path} must hold exactly {', '.join(sorted(expected))}; missing or unknown: {', '.join(odd)}"
        )
    if data != sealed(data):
        raise AdapterError(f"{path} is damaged or was edited: it is not what its sha256 says; take it from a copy")
    base = data["base"]
    sites = base.get("sites") if isinstance(base, dict) else None
    if not (
        isinstance(sites, dict)
        and type(base.get("sampled")) is bool
        and all(_is_print(site) for site in sites.values())
    ):
        raise AdapterError(
            f"{path}: 'base' does not describe a base (sampled, and for each site shape, dtype and sha256)"
        )
    aliases = data.get("aliases", {})
    if not isinstance(aliases, dict) or not all(isinstance(first, str) for first in aliases.values()):
        raise AdapterError(f"{path}: 'aliases' must map names of tensors to names of tensors")
    return data


def _require_unchanged(path: Path, expected: str) -> None:
    try:
        with path.open("rb") as handle:
            found = hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
    if found != expected:
        raise AdapterError(
            f"{path} is damaged or was changed: it is not what was written together with {OURS} (their sha256 differ)."
            f" Take it from a copy; if another program wrote it on purpose, delete {OURS}, and it is read as PEFT's"
        )


def _is_print(site: Any) -> bool:
    return isinstance(site, dict) and set(site) == {"shape", "dtype", "sha256"} and isinstance(site["shape"], list)


def _spec(data: Any, path: Path) -> Spec:
    try:
        return Spec.from_dict(data)
    except (SpecError, TypeError) as error:
        raise AdapterError(f"{path}: its spec is not valid: {error}") from error


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as handle:
            text = handle.read(min(os.fstat(handle.fileno()).st_size, _MAX_JSON) + 1)
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
    if len(text) > _MAX_JSON:
        raise AdapterError(f"{path} is larger than {_MAX_JSON} bytes; no adapter's is")
    return text


def _parsed(text: bytes, path: Path) -> dict[str, Any]:
    try:
        return parse_object(text, str(path))
    except VerificationError as error:
        raise AdapterError(str(error)) from error


def _sha256(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def finite(tensors: Mapping[str, Tensor]) -> None:
    """A checkpoint that `load` would refuse is not worth replacing a good one."""
    if broken := [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]:
        listed = ", ".join(broken[:8])
        raise AdapterError(
            f"{len(broken)} tensors hold NaN or infinite values, so training has diverged and nothing was saved:"
            f" {listed}"
        )


def as_adapter_error(error: LrcompileError, folder: Path) -> AdapterError:
    """The same complaint, naming the adapter it is about."""
    return AdapterError(f"the adapter in {folder} cannot be used: {error}")
