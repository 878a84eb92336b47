"""Hold every rung to what it claims, and say how much of the adapter each one keeps.

Rungs that only reorder float32 arithmetic are held to the limits against float64 of the trained model. Rounding
weights to NF4 is an approximation: what it takes of the adapter's effect is measured and reported, and the *graph* is
held to the limits against float64 of the eager NF4 model it must reproduce.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

import lrcompile
from lrcompile.pipeline import VerifyPart
from lrcompile.verifying.verdict import Limits, Rung, Verdict


@dataclass(frozen=True)
class Checked:
    """`claims`: rung key to (name of its reference, its numbers, holds). `kept`: rung key to its adapter-relative
    error.
    """

    claims: dict[str, tuple[str, Rung, bool | None]]
    kept: dict[str, float | None]
    verdicts: dict[str, Verdict]

    @property
    def ok(self) -> bool:
        return all(verdict.ok for verdict in self.verdicts.values())


@dataclass(frozen=True)
class Claim:
    """`rungs` (key to candidate) compute what `reference` means; `own` is the key of the reference's own rung, if
    it has one.
    """

    name: str
    reference: nn.Module
    own: str | None
    rungs: Mapping[str, Any]


def check(
    trained: nn.Module, base: nn.Module, claims: list[Claim], inputs: dict[str, Tensor], part: VerifyPart
) -> Checked:
    """Verify each claim on `inputs`. `trained` is the eager adapted model, `base` the model before its adapter was
    trained.
    """
    limits = Limits(bound_ratio=part.bound_ratio, adapter_relative_error=part.adapter_relative_error)
    found = Checked({}, {}, {})
    for claim in claims:
        verdict = lrcompile.verify(claim.reference, dict(claim.rungs), inputs, limits=limits, base=base)
        found.verdicts[claim.name] = verdict
        numbers = {rung.name: rung for rung in verdict.rungs}
        if claim.own is not None:
            if claim.reference is trained:
                found.kept[claim.own] = numbers["eager"].adapter_relative_error
            found.claims[claim.own] = (claim.name, numbers["eager"], None)
        for key in claim.rungs:
            found.claims[key] = (claim.name, numbers[key], verdict.ok)
        if claim.reference is trained:
            found.kept.update({key: numbers[key].adapter_relative_error for key in claim.rungs})
    others = {key: value for claim in claims if claim.reference is not trained for key, value in _all(claim).items()}
    if others:
        # Numbers only: what an approximation loses has no limit here, so no verdict is taken from this comparison.
        kept = lrcompile.verify(trained, others, inputs, limits=limits, base=base, locate=False)
        found.kept.update({rung.name: rung.adapter_relative_error for rung in kept.rungs if rung.name in others})
    return found


def _all(claim: Claim) -> dict[str, Any]:
    return ({claim.own: claim.reference} if claim.own is not None else {}) | dict(claim.rungs)
