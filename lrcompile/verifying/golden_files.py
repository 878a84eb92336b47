"""The files of a golden case: `golden.json`, `weights.safetensors`, `data.safetensors`. A case from outside is hostile.

Sizes and header are bounded before anything is allocated, every key may stand once, unknown keys and versions are
refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lrcompile import safe_tensors
from lrcompile.errors import VerificationError
from lrcompile.verifying.golden_forms import check_forms
from lrcompile.verifying.manifest import sha256
from lrcompile.verifying.strictjson import read_object
from lrcompile.verifying.verdict import Limits
from lrcompile.writing import atomic_folder

SCHEMA = 2
MANIFEST, WEIGHTS, DATA = "golden.json", "weights.safetensors", "data.safetensors"
MAX_BYTES = 4 << 30
_MAX_HEADER = 32 << 20
_MAX_TENSORS = 100_000
_MAX_RANK = 16


@dataclass(frozen=True)
class Case:
    """What `golden.json` says. `model` describes how to rebuild it, `inputs` are trees whose leaves name tensors in
    the data file.
    """

    reason: str
    model: dict[str, Any]
    inputs: list[Any]
    outputs: list[list[str]]
    limits: dict[str, Any]
    limits_reason: str
    environment: dict[str, Any]
    adapters: list[dict[str, Any]] = field(default_factory=list)
    quantization: dict[str, Any] | None = None
    pipeline: str | None = None
    forms: list[str] = field(default_factory=list)
    updates: list[dict[str, Any]] = field(default_factory=list)
    sha256: dict[str, str] = field(default_factory=dict)


def write_case(path: Path, case: Case, weights: Mapping[str, Tensor], data: Mapping[str, Tensor]) -> None:
    """Exchange the folder `path` as a whole for one that holds this case."""
    with atomic_folder(path, error=VerificationError) as folder:
        for name, tensors in ((WEIGHTS, weights), (DATA, data)):
            own = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
            try:
                save_file(own, folder / name)
            except SafetensorError as error:
                raise VerificationError(f"{path}: {name} cannot be written: {error}") from error
        content = {
            "schema": SCHEMA,
            **asdict(case),
            "sha256": {name: sha256(folder / name) for name in (WEIGHTS, DATA)},
        }
        try:
            content["seal"] = seal(content)
            text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise VerificationError(f"{path}: something of this case has no form in JSON: {error}") from error
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def seal(content: Mapping[str, Any]) -> str:
    """sha256 over a manifest but its seal: what was damaged or edited by hand shows. It is no signature."""
    rest = {key: value for key, value in content.items() if key != "seal"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def read_case(path: Path) -> Case:
    """The manifest of the case in the folder `path`; unknown keys, missing keys and wrong types are refused."""
    manifest = path / MANIFEST
    _own_file(manifest)
    content = read_object(manifest, schema=SCHEMA)
    if content.get("seal") != seal(content):
        raise VerificationError(
            f"{manifest} is not as it was written: its seal differs; restore it, or record the case anew"
        )
    del content["schema"], content["seal"]
    known = {entry.name: str(entry.type) for entry in fields(Case)}
    if set(content) != set(known):
        unknown, missing = sorted(set(content) - set(known)), sorted(set(known) - set(content))
        raise VerificationError(f"{manifest}: unknown keys {unknown}, missing keys {missing}")
    kinds = {"str": str, "dict": dict, "list": list}
    for name, kind in known.items():
        value = content[name]
        if not (value is None and kind.endswith("| None")) and not isinstance(
            value, kinds[kind.split("[")[0].split(" ")[0]]
        ):
            raise VerificationError(f"{manifest}: {name} is a {type(value).__name__}; {kind} is expected")
    if set(content["sha256"]) != {WEIGHTS, DATA} or len(content["inputs"]) != len(content["outputs"]):
        raise VerificationError(f"{manifest}: sha256 must name {WEIGHTS} and {DATA}, and each input its outputs")
    if not all(
        isinstance(names, list) and all(isinstance(name, str) for name in names) for names in content["outputs"]
    ):
        raise VerificationError(f"{manifest}: outputs must be lists of names")
    Limits.from_dict(content["limits"])
    try:
        check_forms(content["forms"])
    except VerificationError as error:
        raise VerificationError(f"{manifest}: {error}") from error
    return Case(**content)


def changed_files(path: Path, case: Case) -> list[str]:
    """A sentence for each file whose content is not the recorded one."""
    reasons = []
    for name, expected in case.sha256.items():
        _own_file(path / name)
        if sha256(path / name) != expected:
            reasons.append(f"{name} is not the file that was recorded (sha256 differs)")
    return reasons


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a case's file, which is a plain file of bounded size."""
    _own_file(path)
    return safe_tensors.read_tensors(path, VerificationError, MAX_BYTES)


def _own_file(path: Path) -> None:
    if path.is_symlink() or not path.is_file():
        raise VerificationError(f"{path} is missing or is a link; a golden case holds its files itself")


def pack(tree: Any, prefix: str, tensors: dict[str, Tensor]) -> Any:
    """A tree of inputs as plain JSON; its tensors go into `tensors` under names that begin with `prefix`."""
    if isinstance(tree, Tensor):
        tensors[prefix] = tree
        return {"tensor": prefix}
    if isinstance(tree, dict) and all(isinstance(key, str) for key in tree):
        return {"dict": {key: pack(value, f"{prefix}/{key}", tensors) for key, value in tree.items()}}
    if type(tree) in (list, tuple):
        return {type(tree).__name__: [pack(value, f"{prefix}/{index}", tensors) for index, value in enumerate(tree)]}
    if tree is None or type(tree) in (bool, int, str) or (type(tree) is float and math.isfinite(tree)):
        return {"value": tree}
    raise VerificationError(
        f"an input of type {type(tree).__name__} at {prefix} cannot be stored; tensors and plain values can"
    )


def unpack(tree: Any, tensors: Mapping[str, Tensor], depth: int = 0) -> Any:
    """The inverse of `pack`."""
    if not isinstance(tree, dict) or len(tree) != 1 or depth > 32:
        raise VerificationError(f"a golden's input is malformed: {str(tree)[:80]}")
    kind, content = next(iter(tree.items()))
    if kind == "tensor" and isinstance(content, str) and content in tensors:
        return tensors[content]
    if kind == "dict" and isinstance(content, dict):
        return {key: unpack(value, tensors, depth + 1) for key, value in content.items()}
    if kind in ("list", "tuple") and isinstance(content, list):
        items = [unpack(value, tensors, depth + 1) for value in content]
        return items if kind == "list" else tuple(items)
    if kind == "value" and (content is None or isinstance(content, bool | int | float | str)):
        return content
    raise VerificationError(f"a golden's input is malformed: {str(tree)[:80]}")


def recorded_inputs(folder: Path) -> list[Any]:
    """The input sets of a case, from the very files that were recorded."""
    case = read_case(folder)
    if changed := changed_files(folder, case):
        raise VerificationError(f"{folder}: {'; '.join(changed)}; restore it or record a new case")
    return input_sets_of(folder, case, read_tensors(folder / DATA))


def input_sets_of(folder: Path, case: Case, data: Mapping[str, Tensor]) -> list[Any]:
    sets = [unpack(tree, data) for tree in case.inputs]
    if not sets or not all(isinstance(given, dict | tuple) for given in sets):
        raise VerificationError(f"{folder}: an input set must be a dict or a tuple, and there must be one")
    return sets


def outputs_of(folder: Path, case: Case, data: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """What was recorded for each input set."""
    try:
        sets = [{name: data[f"outputs/{index}/{name}"] for name in names} for index, names in enumerate(case.outputs)]
    except KeyError as error:
        raise VerificationError(f"{folder}: the recorded output {error} is missing from {DATA}") from error
    refuse_nan(folder, sets)
    return sets


def refuse_nan(folder: Path, outputs: list[dict[str, Tensor]]) -> None:
    """A model that gives NaN is broken, and a golden of it would guard nothing. (−∞ is how logits are masked.)"""
    broken = [name for named in outputs for name, value in named.items() if bool(torch.isnan(value).any())]
    if broken:
        raise VerificationError(
            f"{folder}: the outputs {', '.join(dict.fromkeys(broken))} hold NaN; a golden is of a model that works"
        )


def environment() -> dict[str, Any]:
    """What may explain a drift: versions, instruction set, threads."""
    import platform

    import lrcompile

    versions = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "lrcompile": lrcompile.__version__,
    }
    return {**versions, "cpu": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}


def cases(path: str | os.PathLike[str]) -> list[Path]:
    """The case folder `path`, or the case folders in it."""
    folder = Path(path)
    if (folder / MANIFEST).exists():
        return [folder]
    found = sorted(entry.parent for entry in folder.glob(f"*/{MANIFEST}")) if folder.is_dir() else []
    if not found:
        raise VerificationError(f"{folder} is no golden case and holds none: there is no {MANIFEST}")
    return found
