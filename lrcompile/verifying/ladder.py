"""The ladder of a verification: each rung against float64, and what it adds to the rung before."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from lrcompile.verifying.comparing import Expected, adapter_effect, compare
from lrcompile.verifying.routing import compare_choices
from lrcompile.verifying.verdict import Limits, OutputRow, Rung, Verdict

_MOST_OF_AN_EFFECT = 0.5  # an error of half the adapter's effect is no rounding any more, whatever the dtype


class Ladder:
    """Collects rungs: numbers against float64, what each adds, and the reasons that a candidate fails."""

    def __init__(self, expected: list[Expected], limits: Limits, exact: str = "float64"):
        self.expected = expected
        self.limits = limits
        self.rungs: list[Rung] = [Rung(exact, 0.0, 0.0, 0.0, 0.0)]
        self.own: Rung | None = None
        self.judged: list[Rung] = []
        self.rows: list[OutputRow] = []
        self.failures: list[str] = []
        self.first_failed: str | None = None
        self.eager: list[dict[str, Tensor]] = []
        self.before: list[dict[str, Tensor]] = []

    def start(self, own: list[dict[str, Tensor]], *, shown: bool) -> None:
        """The reference's own outputs: a rung that is not judged, or (a file's) the first one itself."""
        self.eager = own
        if shown:
            self.climb("eager", own, judged=False)
            self.own = self.rungs[-1]

    def climb(
        self,
        name: str,
        actual: list[dict[str, Tensor]],
        *,
        judged: bool = True,
        choices: list[list[Tensor]] | None = None,
        expected: list[Expected] | None = None,
    ) -> None:
        """Add the rung `name` with its outputs per input set; `choices` are those of its routers, and `expected` what
        is right at these choices, where they are not the reference's.
        """
        rows, failures = [], []
        for index, (want, got, mine) in enumerate(zip(self.expected, actual, self.eager, strict=True)):
            row, failure = compare(expected[index] if expected else want, got, mine, self.limits)
            if choices is not None:
                routers, wrong = compare_choices(choices[index], want.choices, want.free)
                row, failure = row + routers, failure + wrong
            rows.append(row)
            failures += failure
        merged = [_worst(each) for each in zip(*rows, strict=True)]
        error, cosine = adapter_effect(expected or self.expected, actual)
        added = [self._added(index, got) for index, got in enumerate(actual)]
        self.rungs.append(
            Rung(
                name,
                max((row.bound_ratio for row in merged if row.bound_ratio is not None), default=0.0),
                max((row.max_abs_error for row in merged if row.max_abs_error is not None), default=0.0),
                max(ratio for ratio, _ in added),
                max(size for _, size in added),
                error,
                cosine,
            )
        )
        self.before = actual
        if not judged:
            return
        self.judged.append(self.rungs[-1])
        if self.first_failed is None:
            self.rows = merged
        failures += self._adapter_failures(error)
        if failures and self.first_failed is None:
            self.first_failed = name
        self.failures += [f"{name}: {failure}" for failure in dict.fromkeys(failures)]

    @property
    def allowed(self) -> float | None:
        """The share of the adapter's effect that an error may be; None without an effect."""
        if self.rungs[-1].adapter_relative_error is None:
            return None
        own = self.own.adapter_relative_error if self.own is not None else 0.0
        return max(self.limits.adapter_relative_error, min(2 * (own or 0.0), _MOST_OF_AN_EFFECT))

    def _adapter_failures(self, error: float | None) -> list[str]:
        allowed = self.allowed
        if error is None or allowed is None or error <= allowed:
            return []
        own = self.own.adapter_relative_error if self.own is not None else None
        rounding = f" (the reference's own rounding is {own:.3g} of it)" if own is not None else ""
        return [f"the error is {error:.3g} of the adapter's effect, over {allowed:.3g}{rounding}"]

    def _added(self, index: int, actual: dict[str, Tensor]) -> tuple[float, float]:
        """Largest |y - y of the rung before| over D, and as it is, over the outputs where both are finite alike."""
        before = self.before[index] if self.before else None
        ratio = size = 0.0
        for name, bound in self.expected[index].bounds.items():
            mine = actual[name].to(bound.exact)
            last = bound.exact if before is None else before[name].to(bound.exact)
            if mine.shape == last.shape:
                change = (mine - last)[torch.isfinite(mine) & torch.isfinite(last)].abs()
                worst = float(change.max()) if change.numel() else 0.0
                ratio, size = max(ratio, bound.ratio(worst)), max(size, worst)
        return ratio, size

    def verdict(self, dtype: str, session: dict[str, Any]) -> Verdict:
        shares = [rung.adapter_relative_error for rung in self.judged if rung.adapter_relative_error is not None]
        cosines = [rung.effect_cosine for rung in self.judged if rung.effect_cosine is not None]
        return Verdict(
            ok=not self.failures,
            bound_ratio=max(rung.bound_ratio for rung in self.judged),
            adapter_relative_error=max(shares, default=None),
            effect_cosine=min(cosines, default=None),
            first_divergence=None,
            rungs=tuple(self.rungs),
            outputs=tuple(self.rows),
            limits=self.limits,
            failures=tuple(self.failures),
            dtype=dtype,
            session=session,
            note=self._own_note(),
        )

    def _own_note(self) -> str | None:
        if self.own is None or self.own.bound_ratio <= self.limits.bound_ratio:
            return None
        own = self.own.bound_ratio
        return f"the reference itself leaves the bound in its own dtype (r = {own:.3g}): not only its linear maps round"


def _worst(rows: tuple[OutputRow, ...]) -> OutputRow:
    """One row for an output over several input sets: the worst of each number."""

    def over(name: str, pick: Any) -> Any:
        values = [value for value in (getattr(row, name) for row in rows) if value is not None]
        return pick(values) if values else None

    picks = {"bound_ratio": max, "max_abs_error": max, "relative_error": max, "mismatches": max, "kl": max, "top1": min}
    return dataclasses.replace(rows[0], **{name: over(name, pick) for name, pick in picks.items()})
