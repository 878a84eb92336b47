"""`.onnx_adapter` files: written for one graph, and checked for what ONNX Runtime takes on trust.

It looks at names and shapes when the graph runs, and at nothing else: not whether the adapter belongs to this graph,
not whether two active ones bind one name (the first wins), not whether a pair is whole or its numbers are finite.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrcompile.errors import AdapterError, ExportError, require
from lrcompile.verifying.manifest import sha256, waiting
from lrcompile.wording import listed

SUFFIX = ".onnx_adapter"
_TYPES = {"float32": "tensor(float)", "float64": "tensor(double)", "float16": "tensor(float16)"}


def file_name(model: str | os.PathLike[str], adapter: str) -> str:
    return f"{Path(model).stem}.{adapter}{SUFFIX}"


def model_version(digest: str) -> int:
    """What an adapter file says of the graph it is for: 31 bits of that file's sha256. ONNX Runtime does not look."""
    return int(digest[:8], 16) >> 1


def write_adapter(path: Path, digest: str, tensors: Mapping[str, Tensor]) -> None:
    """Write `tensors`, by graph input, to `path`; `digest` is the sha256 of the graph."""
    ort = require("onnxruntime", "onnx")
    made = ort.AdapterFormat()
    made.set_adapter_version(1)
    made.set_model_version(model_version(digest))
    arrays = {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in tensors.items()}
    made.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()})
    made.export_adapter(os.fspath(path))


def names_of(adapters: Any) -> tuple[str, ...]:
    """The adapters that a caller names: one, several or none."""
    if isinstance(adapters, str):
        return (adapters,)
    if isinstance(adapters, Mapping) or not isinstance(adapters, Iterable):
        raise AdapterError(
            f"adapters={adapters!r}: expected the name of one or several names; a weight is part of an adapter's file"
            " (lrcompile.activate(model, {name: weight}), then lrcompile.export_adapter)"
        )
    return tuple(adapters)


def takes_adapters(manifest: Mapping[str, Any]) -> bool:
    said = manifest.get("adapters")
    return isinstance(said, dict) and said.get("form") == "inputs"


@dataclass(frozen=True)
class Loaded:
    """Adapters that act together: as `RunOptions.add_active_adapter` takes them, and their values by graph input, for
    runs with bound inputs, in which ONNX Runtime leaves active adapters out without a word.
    """

    adapters: list[Any]
    values: dict[str, Any]


@dataclass(frozen=True)
class Interface:
    """What a manifest says of the inputs that adapters may bind, and of the adapters there are."""

    path: Path
    """The graph."""
    inputs: Mapping[str, tuple[str, tuple[int | str, ...]]]
    """dtype and shape by name."""
    unread: frozenset[str]
    """What adapters hold for parts of the model that the graph does not compute."""
    files: Mapping[str, Mapping[str, Any]]
    """By adapter."""
    hashes: Mapping[str, str]

    @classmethod
    def of(cls, path: Path, manifest: Mapping[str, Any]) -> Interface:
        """Raises `AdapterError` for a manifest that does not have the form of one."""
        said: Any = manifest.get("adapters")
        hashes = manifest.get("sha256")
        if not takes_adapters(manifest):
            raise AdapterError(f"{path} takes no adapters; export it with adapters='inputs'")
        try:
            inputs = {str(port["name"]): (str(port["dtype"]), _shape(port["shape"])) for port in said["inputs"]}
            files = {str(name): _entry(path, name, entry) for name, entry in said["files"].items()}
            unread = frozenset(map(str, said["unread"]))
            if not isinstance(hashes, dict) or not all(map(_is_digest, hashes.values())):
                raise TypeError("sha256 is no object of hashes")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise AdapterError(f"the manifest of {path} does not describe its adapters: {error!r}") from error
        return cls(path, inputs, unread, files, hashes)

    def fitted(self, tensors: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
        """`tensors` in the dtypes of the graph; `ExportError` with everything that does not fit it."""
        read = {name: tensor for name, tensor in tensors.items() if name not in self.unread}
        if faults := self._misfits({name: tuple(tensor.shape) for name, tensor in read.items()}):
            raise ExportError(f"{what} does not fit {self.path.name}: {'; '.join(faults)}")
        cast = {name: tensor.to(getattr(torch, self.inputs[name][0])) for name, tensor in read.items()}
        if lost := [name for name, tensor in cast.items() if not bool(torch.isfinite(tensor).all())]:
            dtype = self.inputs[lost[0]][0]
            raise ExportError(f"{what} does not fit {self.path.name}: {lost[0]} leaves the range of {dtype}")
        return cast

    def require_weights(self, adapters: Mapping[str, float]) -> None:
        """Raise `AdapterError` for an adapter whose file holds it with another weight."""
        for name, weight in adapters.items():
            held = self.files[name].get("weight") if name in self.files else weight
            if held != weight:
                raise AdapterError(
                    f"the model has adapter {name!r} active with weight {weight}, its file beside {self.path.name} has"
                    f" {held}: write it anew with lrcompile.export_adapter(model, path, {name!r})"
                )

    def load(self, names: Iterable[str]) -> Loaded:
        """The adapters called so.

        Raises `AdapterError` for one that is not there, not the file the manifest describes, made for another graph, or
        damaged, and for two that act at one place.
        """
        chosen = Loaded([], {})
        taken: dict[str, str] = {}
        for name in dict.fromkeys(names):
            if name not in self.files:
                raise AdapterError(
                    f"{self.path.name} has no adapter {name!r}; it has {', '.join(map(repr, self.files)) or 'none'}."
                    " lrcompile.export_adapter(model, path, name) writes one more"
                )
            adapter, values = self._opened(name)
            for place in map(_place, values):
                if taken.setdefault(place, name) != name:
                    raise AdapterError(
                        f"adapters {taken[place]!r} and {name!r} both act at {place}: ONNX Runtime would take the first"
                        " and ignore the second. Run them one at a time, or give the model one adapter that is both"
                    )
            chosen.adapters.append(adapter)
            chosen.values.update(values)
        return chosen

    def _digest(self, name: str) -> str:
        return self.hashes.get(str(self.files[name]["file"]), "")

    def _place(self, name: str) -> Path:
        """Its file; or, where an export was killed before it came there, the one that waits."""
        place, digest = self.path.with_name(str(self.files[name]["file"])), self._digest(name)
        wait = waiting(place, digest)
        return wait if wait.is_file() and not (place.is_file() and sha256(place) == digest) else place

    def _opened(self, name: str) -> tuple[Any, dict[str, Any]]:
        ort = require("onnxruntime", "onnx")
        path = self._place(name)
        if not path.is_file():
            raise AdapterError(f"the adapter {name!r} is missing: there is no file {path}")
        if sha256(path) != self._digest(name):
            raise AdapterError(
                f"{path} is not the file that the manifest of {self.path.name} describes (its sha256 differs): it was"
                " changed, or an export was interrupted. Export it again"
            )
        try:
            held = ort.AdapterFormat.read_adapter(os.fspath(path))
            given = held.get_parameters()
            values = {key: value.numpy() for key, value in given.items()}
            adapter = ort.LoraAdapter()
            adapter.Load(os.fspath(path))
        except (RuntimeError, ValueError, UnicodeDecodeError) as error:
            raise AdapterError(f"{path} is no adapter that ONNX Runtime reads: {error}") from error
        faults = self._misfits({key: value.shape for key, value in values.items()})
        if held.get_model_version() != model_version(self.hashes.get(self.path.name, "0" * 8)):
            faults.append("it was made for another graph than this one")
        for key, value in values.items():
            tensor = torch.from_numpy(value.copy())
            dtype = str(tensor.dtype).removeprefix("torch.")
            if key in self.inputs and dtype != self.inputs[key][0]:
                faults.append(f"{key} is {dtype}, the graph takes {self.inputs[key][0]}")
            if not bool(torch.isfinite(tensor).all()):
                faults.append(f"{key} holds NaN or infinite values")
        if faults:
            raise AdapterError(f"{path} does not fit {self.path.name}: {'; '.join(faults)}")
        return adapter, given

    def _misfits(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """What is wrong with these tensors as inputs of the graph, in words."""
        faults: list[str] = []
        ranks: dict[str, list[tuple[str, int]]] = {}
        if unknown := [name for name in shapes if name not in self.inputs]:
            faults.append(f"the graph has no input {listed(unknown)}")
        for name, shape in shapes.items():
            if name not in self.inputs:
                continue
            wanted = self.inputs[name][1]
            if len(shape) != len(wanted) or any(
                isinstance(w, int) and w != s for w, s in zip(wanted, shape, strict=True)
            ):
                faults.append(f"{name} is {list(shape)}, the graph takes {list(wanted)}")
                continue
            for size, symbol in zip(shape, wanted, strict=True):
                if isinstance(symbol, str):
                    ranks.setdefault(symbol, []).append((name, size))
        halves = {symbol: [name for name, (_, shape) in self.inputs.items() if symbol in shape] for symbol in ranks}
        for symbol, given in ranks.items():
            missing = set(halves[symbol]) - {name for name, _ in given}
            if missing:
                faults.append(f"{given[0][0]} is there without {listed(sorted(missing))}")
            elif len({size for _, size in given}) > 1:
                faults.append(" and ".join(f"{name} has rank {size}" for name, size in given))
        return faults


def _place(name: str) -> str:
    """The site, or the parameter, that an input belongs to."""
    for ending in (".lora_A.weight", ".lora_B.weight", ".row_gain", ".output_gain", ".input_gain"):
        if f".{name}".endswith(ending):
            return f".{name}".removesuffix(ending).lstrip(".") or "the model"
    return name


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _shape(sizes: Any) -> tuple[int | str, ...]:
    known = isinstance(sizes, list) and all(type(each) in (str, int) for each in sizes)
    if not known or any(isinstance(each, int) and each < 0 for each in sizes):
        raise ValueError(f"{sizes!r} is no shape")
    return tuple(sizes)


def _entry(path: Path, name: str, entry: Any) -> Mapping[str, Any]:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ValueError(f"{name!r} is no name of an adapter")
    if entry["file"] != file_name(path, name):
        raise ValueError(f"the file of {name!r} is {entry['file']!r}, expected {file_name(path, name)!r}")
    return dict(entry)
