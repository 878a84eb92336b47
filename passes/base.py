"""What a pass is: a frozen dataclass whose fields are its options, a kebab-case name, and a claim of what it
preserves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from lrcompile.passes.tensors import View

Equivalence = Literal["exact", "reassociation", "cast", "approximate"]
"""exact: the same bits. reassociation: the same algebra in another order. cast: that, plus one rounding to the
weight's dtype. approximate: an error the pass states and measures."""
Stage = Literal["dynamo", "export"]
"""What a pass rewrites. export: a `Program`. dynamo: an `fx.GraphModule` as Dynamo captures it, before autograd."""


@dataclass(frozen=True)
class Update(ABC):
    """What an adapter makes of one view of a tensor."""

    view: View

    def __call__(self, tensor: Tensor, base: Tensor) -> None:
        """Change `tensor` in place; `base` is what it was before every update, perhaps in a narrower dtype."""
        self.act(self.view.of(tensor), self.view.of(base))

    @abstractmethod
    def act(self, part: Tensor, base: Tensor) -> None:
        """The same for the view alone."""


@dataclass(frozen=True)
class Pending:
    """A weight not computed yet: `base()` and its updates, accumulated in float32 or wider, rounded once to `dtype`."""

    base: Callable[[], Tensor]
    dtype: torch.dtype
    shape: torch.Size
    updates: tuple[Update, ...] = ()

    def __call__(self) -> Tensor:
        base = self.base()
        weight = base.to(torch.promote_types(base.dtype, torch.float32), copy=True)
        for update in self.updates:
            update(weight, base)
        return weight.to(self.dtype)


@dataclass
class Program:
    """What deploy passes rewrite: a captured program, and the weights in it that are not computed yet."""

    exported: ExportedProgram
    model: nn.Module
    """The module it was captured from: the names and roles of its parts. Never changed."""
    pending: dict[str, Pending] = field(default_factory=dict)
    """By name of the weight in the program. A writer computes one at a time."""

    def compute(self, places: Mapping[str, Tensor] | None = None) -> None:
        """Compute every pending weight, for a consumer that needs them all; those that have a place, into it."""
        state, places = self.exported.state_dict, places or {}
        found = {
            name: places[name].copy_(weight()) if name in places else weight() for name, weight in self.pending.items()
        }
        state.update({name: _like(state[name], weight) for name, weight in found.items()})
        self.pending = {}

    def module(self) -> nn.Module:
        """A module that computes what the program does now; the program keeps its pending weights."""
        state, pending = self.exported.state_dict, self.pending
        held = {name: state[name] for name in pending}
        try:
            self.compute()
            return self.exported.module(check_guards=False)
        finally:
            state.update(held)
            self.pending = pending


def _like(old: Tensor, new: Tensor) -> Tensor:
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
    errors: Mapping[str, float] = field(default_factory=dict)
    """Of an `approximate` pass: the measured error of each tensor it changed, in the unit of its `tolerance`."""

    @property
    def modified(self) -> bool:
        return self.count > 0


Subject = TypeVar("Subject")


@dataclass(frozen=True)
class Pass(ABC, Generic[Subject]):
    """One rewrite. The first line of a subclass's docstring is the identity it uses."""

    name: ClassVar[str]
    stage: ClassVar[Stage] = "export"
    whole: ClassVar[bool] = False
    """Of the dynamo stage: it rewrites a graph together with the bodies that it calls, not each by itself."""
    preserves: ClassVar[Equivalence]
    tolerance: ClassVar[float] = 0.0
    """Of an `approximate` pass: the largest error it may cause in a tensor, in a unit its docstring gives."""

    @abstractmethod
    def apply(self, subject: Subject) -> Result:
        """Rewrite `subject` in place; `modified` is False exactly if nothing changed. Running it again changes
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
