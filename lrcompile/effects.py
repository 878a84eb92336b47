"""How much of an adapter's effect a change of a weight keeps: of the weight itself, or of what the layer puts out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Effect:
    """The change R that was made beside the change D that was meant, both as vectors."""

    share: float
    """⟨R, D⟩/‖D‖²: the part of D that is there; 1 where D is 0."""
    cosine: float
    """⟨R, D⟩/(‖R‖·‖D‖); 1 where D is 0."""
    error: float
    """‖R − D‖/‖D‖: what is missing of D, and what was added that D does not have; 0 where D is 0."""


def effect(made: Tensor, meant: Tensor, moments: Tensor | None = None) -> Effect:
    """Of two changes of one weight `[..., out, in]`, in float64; with the second moments H `[in, in]` of the inputs, of
    the changes of the layer's outputs: ⟨X·Rᵀ, X·Dᵀ⟩ = T·tr(R·H·Dᵀ).
    """
    made, meant = made.double(), meant.double()
    weighted = (lambda change: change) if moments is None else (lambda change: change @ moments.to(change))
    size2, made2 = float((meant * weighted(meant)).sum()), float((made * weighted(made)).sum())
    if not size2 > 0:
        return Effect(1.0, 1.0, 0.0)
    inner = float((made * weighted(meant)).sum())
    gap = made - meant
    return _effect(size2, made2, inner, float((gap * weighted(gap)).sum()))


def effect_on_outputs(before: Iterable[Tensor], meant: Iterable[Tensor], made: Iterable[Tensor]) -> Effect:
    """Of what outputs were, were meant to become and became, each in parts: R = made − before, D = meant − before."""
    sums = [0.0, 0.0, 0.0, 0.0]
    for y0, y, now in zip(before, meant, made, strict=True):
        D, R = y.double() - y0.double(), now.double() - y0.double()
        for index, (left, right) in enumerate(((D, D), (R, R), (R, D), (R - D, R - D))):
            sums[index] += float((left * right).sum())
    return _effect(*sums)


def _effect(size2: float, made2: float, inner: float, lost2: float) -> Effect:
    if size2 == 0:
        return Effect(1.0, 1.0, 0.0)
    cosine = inner / (size2 * made2) ** 0.5 if made2 > 0 else 0.0
    return Effect(inner / size2, cosine, (max(lost2, 0.0) / size2) ** 0.5)
