"""What a method is, as data: nothing here imports torch, so `lrcompile methods` answers at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Option:
    """A field that only some methods have: its default, a test of validity, and the words for what is valid."""

    default: Any
    valid: Callable[[Any], bool]
    expected: str


@dataclass(frozen=True)
class Recipe:
    """A named method: which adapter form it attaches, on which storage of the base, with which extra fields."""

    name: str
    summary: str
    trains: str
    paper: str
    form: str
    """Import path `module:class` of the adapter form."""
    options: Mapping[str, Option] = field(default_factory=dict)
    quantizes_base: bool = False
    """The method keeps its targeted base weights in NF4."""
    peft: str | None = None
    """The PEFT type its checkpoints use, where one exists."""

    def adapter_class(self) -> Any:
        module, _, name = self.form.partition(":")
        return getattr(import_module(module), name)
