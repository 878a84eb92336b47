"""What a pass is: a frozen dataclass whose fields are its options, a kebab-case name, and a claim of what it
preserves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.export import ExportedProgram

from lrcompile.folding import Recipe

Equivalence = Literal["exact", "reassociation", "cast", "approximate"]
"""exact: the same bits. reassociation: the same algebra in another order. cast: that, plus one rounding to the
weight's dtype. approximate: an error the pass states (`tolerance`)."""


@dataclass
class Program:
    """What deploy passes rewrite: a captured program, and the weights in it that are not computed yet."""

    exported: ExportedProgram
    model: nn.Module
    """The module it was captured from: the names and roles of its parts. Never changed."""
    recipes: dict[str, Recipe] = field(default_factory=dict)

    def module(self) -> nn.Module:
        """A module that computes what the program does now, every recipe evaluated."""
        given = {name: self.exported.state_dict[name] for name in self.recipes if name in self.exported.state_dict}
        try:
            self.exported.state_dict.update({name: _like(given[name], self.recipes[name]()) for name in given})
            return self.exported.module(check_guards=False)
        finally:
            self.exported.state_dict.update(given)


def _like(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    return nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new


@dataclass(frozen=True)
class Refusal:
    """A place a pass would have changed and did not: the node, and why."""

    node: str
    reason: str


@dataclass(frozen=True)
class Result:
    """What one run of a pass did."""

    count: int
    refusals: tuple[Refusal, ...] = ()

    @property
    def modified(self) -> bool:
        return self.count > 0


@dataclass(frozen=True)
class Pass(ABC):
    """One rewrite. The first line of a subclass's docstring is the identity it uses."""

    name: ClassVar[str]
    preserves: ClassVar[Equivalence]
    tolerance: ClassVar[float] = 0.0
    """Of an `approximate` pass: the largest ‖y' − y‖ / ‖y‖ it may cause at an output."""

    @abstractmethod
    def apply(self, program: Program) -> Result:
        """Rewrite `program` in place; `modified` is False exactly if nothing changed. Running it again changes
        nothing.
        """

    def __str__(self) -> str:
        """The pass as `--passes` takes it: only options that are not at their default."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return self.name + (_braces(given) if given else "")


def _braces(options: Mapping[str, Any]) -> str:
    return "{" + ",".join(f"{key.replace('_', '-')}={_word(value)}" for key, value in options.items()) + "}"


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
