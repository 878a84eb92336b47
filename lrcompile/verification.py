"""verify: does a candidate compute what the reference means?

    r = max |y - y64| / D        D = largest deviation of a float64 replay in which every linear map rounds by
    u·(|x||W|) e = ‖y - y64‖ / ‖effect‖     effect = y64 - y64 of the base without its adapter

The ladder is float64 of the intended mathematics → the reference in its own dtype → the candidate (or several, in
order); each rung's error is measured against float64, and what it adds against the rung before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lrcompile.comparing import Expected, adapter_effect, compare
from lrcompile.errors import VerificationError
from lrcompile.float64 import float64_copy, float64_mode, widen_inputs
from lrcompile.manifest import artefact
from lrcompile.outputs import Inputs, aligned, call, input_sets, named_outputs, selected
from lrcompile.replay import SEEDS, Deviation, perturbed, unit_roundoff, working_dtype
from lrcompile.runners import ModuleRunner, Runner, evaluating, runner
from lrcompile.verdict import Limits, OutputRow, Rung, Verdict

__all__ = ["Limits", "Rung", "Verdict", "verify"]

_MOST_OF_AN_EFFECT = 0.5  # an error of half the adapter's effect is no rounding any more, whatever the dtype


def verify(
    reference: nn.Module,
    candidate: Any,
    inputs: Inputs | list[Inputs],
    *,
    limits: Limits | None = None,
    base: nn.Module | None = None,
    outputs: Sequence[str] | None = None,
    locate: bool | None = None,
) -> Verdict:
    """max |y - y64| ≤ 16·D for every floating output, ‖y - y64‖ ≤ 0.05·‖adapter's effect‖, integers equal, NaN and
    infinities in place.

    `reference` is an eager module. `candidate` is a module, an `fx.GraphModule`, an exported program, a path to
    `.onnx` or `.pt2`, or a mapping of names to these: the rungs in order, all held to the limits. `inputs` is a dict
    (kwargs), a tuple (args) or a list of several. All run in evaluation mode.

    `base` gives the adapter's effect where the reference no longer knows its adapter (merged for good, reloaded).
    `outputs` restricts the comparison to these names. `locate` looks for the first diverging place: None does when the
    verdict fails. `limits` default to those in the manifest beside an artefact, else `Limits()`.

    A comparison that fails is a `Verdict` with `.ok` False; one that cannot be made raises `VerificationError`.
    """
    if not isinstance(reference, nn.Module):
        raise VerificationError(f"the reference must be an nn.Module, not {type(reference).__name__}")
    sets = input_sets(inputs)
    rungs = dict(candidate) if isinstance(candidate, Mapping) else {"candidate": candidate}
    if not rungs:
        raise VerificationError("the mapping of candidates is empty; give at least one")
    manifests = {name: artefact(value) for name, value in rungs.items()}
    runners = {name: runner(value, session=manifests[name].session) for name, value in rungs.items()}
    if not isinstance(candidate, Mapping):
        runners = {one.label: one for one in runners.values()}
    limits = limits or next((entry.limits for entry in reversed(manifests.values()) if entry.limits), Limits())

    dtype = working_dtype(reference, sets)
    expected = expectations(reference, sets, unit_roundoff(dtype), base, outputs)
    ladder = _Ladder(expected, limits)
    own = [selected(one, outputs, "the reference") for one in map(ModuleRunner(reference).run, sets)]
    ladder.climb("eager", own)
    for name, one in runners.items():
        results = [one.run(given) for given in sets]
        ladder.climb(name, [aligned(mine, theirs, one.label) for mine, theirs in zip(own, results, strict=True)])
    for entry in manifests.values():
        ladder.failures += entry.stale
    verdict = ladder.verdict(str(dtype).removeprefix("torch."), {name: one.session for name, one in runners.items()})
    if not (locate or (locate is None and not verdict.ok)):
        return verdict
    return _located(verdict, reference, runners.get(ladder.first_failed or "", one), sets[0], unit_roundoff(dtype))


def expectations(
    reference: nn.Module,
    sets: list[Inputs],
    roundoff: float,
    base: nn.Module | None = None,
    outputs: Sequence[str] | None = None,
) -> list[Expected]:
    """y64, D and the base's y64 for each set of inputs; the doubled copies live one at a time."""
    twin, expected = float64_copy(reference), []
    for given in sets:
        exact = _run64(twin, given, outputs)
        bounds = {name: Deviation(value, roundoff) for name, value in exact.items() if _inexact(value)}
        for seed in SEEDS if bounds else ():
            with float64_mode(), perturbed(roundoff, seed):
                replayed = _run64(twin, given, outputs)
            for name, bound in bounds.items():
                bound.update(replayed[name])
        expected.append(Expected(bounds, {name: value for name, value in exact.items() if not _inexact(value)}))
    del twin
    plain = _base_copy(reference, base)
    if plain is not None:
        for want, given in zip(expected, sets, strict=True):
            without = _run64(plain, given, None)
            want.base = {
                name: value for name, value in aligned(exact, without, "the base").items() if _inexact(value)
            }
    return expected


def _run64(twin: nn.Module, given: Inputs, outputs: Sequence[str] | None) -> dict[str, Tensor]:
    with evaluating(twin), float64_mode():
        return selected(named_outputs(call(twin, widen_inputs(given))), outputs, "the reference")


def _base_copy(reference: nn.Module, base: nn.Module | None) -> nn.Module | None:
    """The float64 copy of what the reference computes without its adapters, or None if it has none."""
    if base is not None:
        return float64_copy(base)
    if "_lrcompile" not in reference.__dict__:
        return None
    import lrcompile

    # Copied inside the context, so that a merged reference is copied with the base's bits in place.
    with lrcompile.disabled(reference):
        return float64_copy(reference)


def _inexact(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


class _Ladder:
    """Collects rungs: numbers against float64, what each adds, and the reasons that a candidate fails."""

    def __init__(self, expected: list[Expected], limits: Limits):
        self.expected = expected
        self.limits = limits
        self.rungs: list[Rung] = [Rung("float64", 0.0, 0.0, 0.0, 0.0)]
        self.rows: list[OutputRow] = []
        self.failures: list[str] = []
        self.first_failed: str | None = None
        self.eager: list[dict[str, Tensor]] = []
        self.before: list[dict[str, Tensor]] = []

    def climb(self, name: str, actual: list[dict[str, Tensor]]) -> None:
        self.eager = self.eager or actual
        rows, failures = [], []
        for want, got, mine in zip(self.expected, actual, self.eager, strict=True):
            row, failure = compare(want, got, mine, self.limits)
            rows.append(row)
            failures += failure
        self.rows = [_worst(each) for each in zip(*rows, strict=True)]
        error, cosine = adapter_effect(self.expected, actual)
        added = [self._added(index, got) for index, got in enumerate(actual)]
        self.rungs.append(
            Rung(
                name,
                max((row.bound_ratio for row in self.rows if row.bound_ratio is not None), default=0.0),
                max((row.max_abs_error for row in self.rows if row.max_abs_error is not None), default=0.0),
                max(ratio for ratio, _ in added),
                max(size for _, size in added),
                error,
                cosine,
            )
        )
        self.before = actual
        if len(self.rungs) == 2:
            return  # eager is what the candidates are measured beside, not one of them
        failures += self._adapter_failures(error)
        if failures and self.first_failed is None:
            self.first_failed = name
        self.failures += [f"{name}: {failure}" for failure in dict.fromkeys(failures)]

    def _adapter_failures(self, error: float | None) -> list[str]:
        own = self.rungs[1].adapter_relative_error
        if error is None or own is None:
            return []
        allowed = max(self.limits.adapter_relative_error, min(2 * own, _MOST_OF_AN_EFFECT))
        if error <= allowed:
            return []
        return [
            f"the error is {error:.3g} of the adapter's effect, over {allowed:.3g} "
            f"(the reference's own rounding is {own:.3g} of it)"
        ]

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
        last = self.rungs[-1]
        return Verdict(
            ok=not self.failures,
            bound_ratio=last.bound_ratio,
            adapter_relative_error=last.adapter_relative_error,
            effect_cosine=last.effect_cosine,
            first_divergence=None,
            rungs=tuple(self.rungs),
            outputs=tuple(self.rows),
            limits=self.limits,
            failures=tuple(self.failures),
            dtype=dtype,
            session=session,
        )


def _worst(rows: tuple[OutputRow, ...]) -> OutputRow:
    """One row for an output over several input sets: the worst of each number."""

    def over(name: str, pick: Any) -> Any:
        values = [value for value in (getattr(row, name) for row in rows) if value is not None]
        return pick(values) if values else None

    picks = {"bound_ratio": max, "max_abs_error": max, "relative_error": max, "mismatches": max, "kl": max, "top1": min}
    return dataclasses.replace(rows[0], **{name: over(name, pick) for name, pick in picks.items()})


def _located(verdict: Verdict, reference: nn.Module, one: Runner, given: Inputs, roundoff: float) -> Verdict:
    from lrcompile.intermediates import first_divergence

    found, note = first_divergence(reference, one, given, roundoff, verdict.limits.bound_ratio)
    return dataclasses.replace(verdict, first_divergence=found.name if found else None, divergence=found, note=note)
