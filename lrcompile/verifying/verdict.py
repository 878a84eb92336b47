"""What a verification found: numbers per rung and per output, the limits they were held to, and the reasons for a
failure.
"""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass, field
from typing import Any

from lrcompile.errors import VerificationError
from lrcompile.tables import render


@dataclass(frozen=True)
class Limits:
    """What a candidate is held to.

    - `bound_ratio`: r = max|y - y64| / D per output. Correct float32 kernels stay under 4; 16 leaves room for another
      summation order and still catches an int8 activation path by a factor of hundreds.
    - `adapter_relative_error`: ‖y - y64‖ / ‖effect of the adapter‖. 0.05 lies between a merge into float16 (0.02 for a
      small adapter) and one into bfloat16 (0.17), an adapter lost to requantization measures 1.07. Where the
      reference's own rounding is a larger share of the effect, twice that share is allowed instead, never more than
      one half: a lost adapter always fails.
    - `declared_error`: further ‖y - y64‖ / ‖y64‖ that an approximate step (quantization) declares; 0 for all others.
    - `kl`, `top1`: largest mean KL divergence (nats) and least top-1 agreement of logits; None: reported only.
    """

    bound_ratio: float = 16.0
    adapter_relative_error: float = 0.05
    declared_error: float = 0.0
    kl: float | None = None
    top1: float | None = None

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value is None and name in ("kl", "top1"):
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
                raise VerificationError(f"limit {name} must be a finite number of at least 0, not {value!r}")

    def to_dict(self) -> dict[str, float | None]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> Limits:
        known = {entry.name for entry in dataclasses.fields(cls)}
        if not isinstance(data, dict) or not set(data) <= known:
            raise VerificationError(f"limits must be an object with some of {', '.join(sorted(known))}, not {data!r}")
        return cls(**data)

    def loosens(self, other: Limits) -> list[str]:
        """The names of the limits that would let more pass than `other` does."""

        def room(value: float | None) -> float:
            return math.inf if value is None else value

        wider = [
            n
            for n in ("bound_ratio", "adapter_relative_error", "declared_error")
            if getattr(self, n) > getattr(other, n)
        ]
        wider += ["kl"] if room(self.kl) > room(other.kl) else []
        return wider + (["top1"] if (self.top1 or 0.0) < (other.top1 or 0.0) else [])


@dataclass(frozen=True)
class Rung:
    """One step of the ladder: its deviation from float64, and what it adds to that of the step before."""

    name: str
    bound_ratio: float
    max_abs_error: float
    added_ratio: float
    added_error: float
    adapter_relative_error: float | None = None
    effect_cosine: float | None = None


@dataclass(frozen=True)
class OutputRow:
    """One output of the candidate against float64 (integers: against the eager reference, exactly)."""

    name: str
    shape: tuple[int, ...]
    bound_ratio: float | None = None
    max_abs_error: float | None = None
    relative_error: float | None = None
    mismatches: int | None = None
    kl: float | None = None
    top1: float | None = None


@dataclass(frozen=True)
class Place:
    """A module or node of the reference, as a candidate computes it; `entering <path>` is what goes into a module.

    `bound_ratio` is the whole error, `local_ratio` what the candidate itself adds there to the values it hands in.
    `effect_error` and `effect_cosine` say what became of the adapter's effect at this place (1: off by all of it).
    `node` is the candidate's own name for what makes the value.
    """

    name: str
    bound_ratio: float
    local_ratio: float | None
    max_abs_error: float
    effect_error: float | None = None
    effect_cosine: float | None = None
    node: str | None = None


@dataclass(frozen=True, kw_only=True)
class Divergence(Place):
    """The first place whose deviation leaves its bound. `inherited_ratio` is the largest ratio among the places before
    it.
    """

    inherited_ratio: float
    compared: int

    def __str__(self) -> str:
        made = f", made by {self.node}" if self.node else ""
        local = f", {self.local_ratio:.3g} of it its own" if self.local_ratio is not None else ""
        lost = f", off by {self.effect_error:.3g} of its adapter's effect" if self.effect_error is not None else ""
        return (
            f"{self.name}{made} (r = {self.bound_ratio:.3g}{local}, inherited {self.inherited_ratio:.3g}{lost}, "
            f"max |error| {self.max_abs_error:.3g}; {self.compared} places compared)"
        )


@dataclass(frozen=True)
class Verdict:
    """Whether a candidate computes what the reference means, with the numbers; prints as a table.

    `bound_ratio`, `adapter_relative_error` and `effect_cosine` are the worst over candidates, outputs and input sets;
    `outputs` are those of the first candidate that fails, or of the last one.
    """

    ok: bool
    bound_ratio: float
    adapter_relative_error: float | None
    effect_cosine: float | None
    first_divergence: str | None
    rungs: tuple[Rung, ...]
    outputs: tuple[OutputRow, ...]
    limits: Limits
    failures: tuple[str, ...] = ()
    dtype: str = "float32"
    session: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, int | None] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    divergence: Divergence | None = None
    places: tuple[Place, ...] = ()
    uncompared: tuple[str, ...] = ()
    note: str | None = None
    name: str = ""

    def __bool__(self) -> bool:
        return self.ok

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON: what is not finite is written as text."""
        return _plain(dataclasses.asdict(self))

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """One self-contained page: the tables, error along depth, effect kept at each site, sizes and settings.

        The pictures need `places`: `verify(..., locate=True)`, or a verdict that failed.
        """
        from lrcompile.verifying.page import write_page

        write_page([self], path)

    def __str__(self) -> str:
        share, start = self.adapter_relative_error, self.rungs[0].name if self.rungs else "nothing"
        lines = [
            *([self.name] if self.name else []),
            render(_LADDER, ([rung.name, *_numbers(rung, 1)] for rung in self.rungs), title=f"ladder from {start}"),
            render(_OUTPUTS, ([row.name, _shape(row), *_numbers(row, 2)] for row in self.outputs), title="outputs"),
            f"{'holds' if self.ok else 'DOES NOT HOLD'}: r = {_number(self.bound_ratio)} "
            f"(limit {self.limits.bound_ratio:g}, rounding of {self.dtype})",
        ]
        if share is not None:
            lines.append(
                f"error / effect of the adapter = {_number(share)} (limit {self.limits.adapter_relative_error:g}), "
                f"cosine of the effect = {_number(self.effect_cosine)}"
            )
        lines += [f"- {failure}" for failure in self.failures]
        if self.divergence is not None:
            lines.append(f"first divergence: {self.divergence}")
        if self.uncompared:
            lines.append(f"not compared: {', '.join(self.uncompared)}")
        return "\n".join([*lines, *([self.note] if self.note else [])])


_LADDER = ("rung", "r", "max |error|", "adds r", "adds |error|", "error/effect", "cosine")
_OUTPUTS = ("output", "shape", "r", "max |error|", "relative", "unequal", "KL", "top-1")


def _numbers(row: Any, start: int) -> list[str]:
    return [_number(value) for value in dataclasses.astuple(row)[start:]]


def _shape(row: OutputRow) -> str:
    return " x ".join(map(str, row.shape)) or "scalar"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
