"""What the command line can hold against each other, and how: models, adapters, `.onnx`, `.pt2`, goldens.

A side that is a module (a model's folder, an adapter's with its base, a golden that rebuilds its model) says what is
right: its float64 is the reference, whichever of the two it is. Where neither is one, `lrcompile.verify` says what
bound there is.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import lrcompile
from lrcompile.demo.opening import Opened, open_model
from lrcompile.errors import VerificationError
from lrcompile.links import followed
from lrcompile.verifying.golden_files import (
    DATA,
    MANIFEST,
    WEIGHTS,
    changed_files,
    input_sets_of,
    outputs_of,
    read_case,
    read_tensors,
)
from lrcompile.verifying.golden_models import built, furnish, rebuild
from lrcompile.verifying.input_files import read_inputs
from lrcompile.verifying.manifest import described
from lrcompile.verifying.runners import RecordedRunner
from lrcompile.verifying.strictjson import read_object
from lrcompile.verifying.verdict import Limits, Verdict

_ADAPTER, _CONFIGS = "adapter_config.json", ("config.json", "classifier.json")


@dataclass(frozen=True)
class Side:
    """`module` computes, `file` is a path that runs, `recorded` are a golden's outputs on its own `inputs`."""

    label: str
    module: nn.Module | None = None
    file: Path | None = None
    recorded: list[dict[str, Tensor]] | None = None
    inputs: list[Any] | None = None
    limits: Limits | None = None
    opened: Opened | None = None

    def candidates(self) -> dict[str, Any]:
        """What of it is judged, by rung: of a golden the recording, then its model as it computes now."""
        found: dict[str, Any] = {}
        if self.recorded is not None:
            found[f"{self.label} as recorded"] = RecordedRunner(self.recorded, f"{self.label} as recorded")
        if self.module is not None or self.file is not None:
            found[self.label] = self.module if self.module is not None else self.file
        return found


def open_side(text: str, *, base: str | None = None, adapter: str | None = None, build: str | None = None) -> Side:
    """What `text` names. Raises `LrcompileError` naming what is missing."""
    path = followed(text)
    if path.suffix in (".onnx", ".pt2"):
        if not path.is_file():
            raise VerificationError(f"there is no file {path}")
        if adapter:
            raise VerificationError(f"{path} is a file of its own; an adapter is loaded into a model")
        return Side(text, file=path)
    if (path / MANIFEST).is_file():
        return _golden(path, text, build)
    if (path / _ADAPTER).is_file() and not any((path / name).is_file() for name in _CONFIGS):
        return _adapted(text, _base_of(path, base), [text])
    return _adapted(text, text, [adapter] if adapter else [])


def adapted(model: str, *adapters: str) -> Opened:
    """The model with these adapters (`[NAME=]DIR`), the last one active."""
    opened = open_model(model)
    for each in adapters:
        name, equals, folder = each.partition("=")
        if equals and not Path(each).exists():
            lrcompile.load(opened.model, folder, name=name)
        else:
            lrcompile.load(opened.model, each)
        opened.model.eval()
    return opened


def _adapted(label: str, model: str, adapters: list[str]) -> Side:
    opened = adapted(model, *adapters)
    return Side(label, module=opened.model.eval(), opened=opened)


def _base_of(folder: Path, base: str | None) -> str:
    """The base of an adapter's folder: the one given, else the folder that its own config names. Never a download that
    a file asks for.
    """
    if base:
        return base
    named = read_object(folder / _ADAPTER).get("base_model_name_or_path")
    if isinstance(named, str) and Path(named).is_dir():
        return named
    raise VerificationError(
        f"{folder} is an adapter, and the model it belongs to ({named!r}) is no folder here; name it with --base MODEL"
    )


def _golden(folder: Path, label: str, build: str | None) -> Side:
    case = read_case(folder)
    if changed := changed_files(folder, case):
        raise VerificationError(f"{folder}: {'; '.join(changed)}; restore it or record a new case")
    weights, data = read_tensors(folder / WEIGHTS), read_tensors(folder / DATA)
    module = None
    if build is not None:
        module = furnish(built(build), case, weights)
    elif case.model.get("kind") == "transformers":
        module = rebuild(case, weights)
    recorded, inputs = outputs_of(folder, case, data), input_sets_of(folder, case, data)
    return Side(label, module, None, recorded, inputs, Limits.from_dict(case.limits))


def shared_inputs(a: Side, b: Side, file: str | None, texts: list[str] | None) -> list[Any]:
    """The input sets of a comparison: a golden's own, a file's, or texts through a model's tokenizer."""
    goldens = [side for side in (a, b) if side.inputs is not None]
    if goldens:
        if file or texts:
            raise VerificationError(
                f"{goldens[0].label} is a golden and holds its own inputs; leave --inputs and --text out"
            )
        first, rest = goldens[0], goldens[1:]
        if any(not _same(first.inputs, side.inputs) for side in rest):
            raise VerificationError(f"{a.label} and {b.label} hold other inputs, so their outputs cannot be compared")
        return list(first.inputs or [])
    if file:
        return read_inputs(file)
    opened = next((side.opened for side in (a, b) if side.opened is not None), None)
    if opened is None:
        raise VerificationError(
            f"{a.label} and {b.label} have no tokenizer: give --inputs FILE (.safetensors, .npz or a golden's folder)"
        )
    found = opened.inputs(None, texts or ["what it computes", "is what was trained, within rounding"])
    for side in (a, b):
        found = _taken(side, found)
    return [found]


def _taken(side: Side, inputs: dict[str, Any]) -> dict[str, Any]:
    """Of a tokenizer's tensors those that a file was exported to take: both sides get the same ones."""
    ports = described(side.file).get("inputs") if side.file is not None else None
    names = {port.get("name") for port in ports if isinstance(port, dict)} if isinstance(ports, list) else set()
    if not names or not names <= set(inputs):
        return inputs
    return {name: value for name, value in inputs.items() if name in names or not isinstance(value, Tensor)}


def compare(a: Side, b: Side, inputs: list[Any], **options: Any) -> Verdict:
    """Hold the two against each other; the side that is a module is the reference, A if both are."""
    judge, other = (b, a) if a.module is None and b.module is not None else (a, b)
    candidates = other.candidates()
    if judge.module is not None:
        reference: Any = judge.module
        if judge.recorded is not None:
            candidates = {f"{judge.label} as recorded": RecordedRunner(judge.recorded, "recorded")} | candidates
    else:
        reference = judge.file if judge.file is not None else RecordedRunner(judge.recorded or [], judge.label)
    options["limits"] = options.get("limits") or a.limits or b.limits
    verdict = lrcompile.verify(reference, candidates, inputs, **options)
    notes = [f"{a.label} is no module: its counterpart {b.label} is the reference"] if judge is b else []
    notes += [verdict.note] if verdict.note else []
    notes += [] if verdict.ok else _other_weights(judge, other)
    return dataclasses.replace(verdict, note="; ".join(notes) or None)


def _other_weights(judge: Side, other: Side) -> list[str]:
    """What to hold a file against whose weights are quantized, where the model it was held against has floats."""
    if judge.module is None or other.file is None:
        return []
    manifest = described(other.file)
    stored = [*_names(manifest.get("nf4")), *_names(manifest.get("integers"))]
    floats = {name for name, parameter in judge.module.named_parameters() if parameter.is_floating_point()}
    rounded = [site for site in stored if f"{site}.weight".lstrip(".") in floats]
    if not rounded:
        return []
    where = "the model as it was quantized before the export"
    if manifest.get("quantize"):
        adapters = manifest.get("adapters")
        folded = isinstance(adapters, dict) and bool(adapters.get("folded"))
        merged = "its adapter merged into it (lrcompile merge MODEL ADAPTER --out DIR), and then " if folded else ""
        where = f"the model with {merged}its weights quantized (lrcompile quantize MODEL --out DIR)"
    return [
        f"{other.label} holds {len(rounded)} weights quantized ({rounded[0]}, …), as its manifest says, and"
        f" {judge.label} holds them as floats, so what quantizing changed counts as error here. What it computes is"
        f" held fairly against {where}: lrcompile verify DIR {other.label}"
    ]


def _names(listed: Any) -> list[str]:
    return [each for each in listed if isinstance(each, str)] if isinstance(listed, list) else []


def _same(one: Any, other: Any) -> bool:
    left, right = pytree.tree_flatten(one), pytree.tree_flatten(other)
    if left[1] != right[1]:
        return False
    return all(
        torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else type(x) is type(y) and x == y
        for x, y in zip(left[0], right[0], strict=True)
    )
