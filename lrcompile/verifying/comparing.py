"""The numbers of one comparison: deviation over bound, adapter-relative error, and what a softmax makes of logits."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lrcompile.verifying.replay import Deviation
from lrcompile.verifying.verdict import Limits, OutputRow


@dataclass
class Expected:
    """What one set of inputs should give: y64 with its bounds, the eager outputs, and y64 of the base when there is an
    adapter.
    """

    bounds: dict[str, Deviation]
    integers: dict[str, Tensor]
    base: dict[str, Tensor] | None = None
    choices: list[Tensor] = field(default_factory=list)
    """Of its routers, in the reference's own dtype; `free` are those of float64."""
    free: list[Tensor] = field(default_factory=list)


def compare(
    expected: Expected, actual: dict[str, Tensor], eager: dict[str, Tensor], limits: Limits
) -> tuple[list[OutputRow], list[str]]:
    """One row an output, and a sentence for each that leaves its limit."""
    rows, failures = [], []
    for name, value in actual.items():
        bound = expected.bounds.get(name)
        row, failure = _integers(name, value, expected, eager) if bound is None else _floats(name, value, bound, limits)
        rows.append(row)
        failures += [f"output {name}: {reason}" for reason in failure]
    return rows, failures


def _integers(name: str, value: Tensor, expected: Expected, eager: dict[str, Tensor]) -> tuple[OutputRow, list[str]]:
    row = OutputRow(name, tuple(value.shape))
    mine = eager[name]
    if value.shape != mine.shape or value.is_floating_point():
        return row, [f"{value.dtype} {tuple(value.shape)} where {mine.dtype} {tuple(mine.shape)} was expected"]
    # Where float64 and eager disagree (a tie broken by rounding) either is right.
    unequal = int(((value.cpu() != mine.cpu()) & (value.cpu() != expected.integers[name].cpu())).sum())
    reasons = [f"{unequal} of {value.numel()} integers differ"] if unequal else []
    return OutputRow(name, tuple(value.shape), mismatches=unequal), reasons


def _floats(name: str, value: Tensor, bound: Deviation, limits: Limits) -> tuple[OutputRow, list[str]]:
    exact, shape = bound.exact, tuple(value.shape)
    if value.shape != exact.shape or not (value.is_floating_point() or value.is_complex()):
        return OutputRow(name, shape), [f"{value.dtype} {shape} where floating {tuple(exact.shape)} was expected"]
    error = difference(value, bound)
    if error is None:
        return OutputRow(name, shape), ["NaN or infinity at other places than in the reference"]
    if exact.numel() and not error.numel():
        return OutputRow(name, shape), ["the reference is NaN or infinite everywhere, so there is nothing to compare"]
    worst = float(error.abs().max()) if error.numel() else 0.0
    ratio = bound.ratio(worst)
    norm, finite = float(error.norm()), exact[torch.isfinite(exact)]
    relative = (
        norm / float(finite.norm()) if finite.numel() and float(finite.norm()) > 0 else (math.inf if norm else 0.0)
    )
    kl, top1 = (
        _logits(value, exact)
        if name.rsplit(".", 1)[-1] == "logits" and exact.dim() and exact.shape[-1] >= 2
        else (None, None)
    )
    row = OutputRow(name, shape, ratio, worst, relative, None, kl, top1)
    return row, _reasons(row, bound, norm, float(finite.norm()), limits)


def _reasons(row: OutputRow, bound: Deviation, norm: float, exact_norm: float, limits: Limits) -> list[str]:
    reasons = []
    if row.bound_ratio is not None and row.bound_ratio > limits.bound_ratio:
        room = limits.declared_error * exact_norm + limits.bound_ratio * bound.bound * math.sqrt(bound.exact.numel())
        if not limits.declared_error:
            reasons.append(f"r = {row.bound_ratio:.3g} is over the limit {limits.bound_ratio:g}")
        elif norm > room:
            reasons.append(f"relative error {row.relative_error:.3g} is over the declared {limits.declared_error:g}")
    if limits.kl is not None and row.kl is not None and row.kl > limits.kl:
        reasons.append(f"mean KL {row.kl:.3g} is over the limit {limits.kl:g}")
    if limits.top1 is not None and row.top1 is not None and row.top1 < limits.top1:
        reasons.append(f"top-1 agreement {row.top1:.4g} is under the limit {limits.top1:g}")
    return reasons


def difference(value: Tensor, bound: Deviation) -> Tensor | None:
    """value - y64 where both are finite, flat, in float64; None where NaN and infinities do not coincide."""
    exact = bound.exact
    value = value.to(exact.device, exact.dtype)
    finite = torch.isfinite(exact)
    if not torch.equal(finite, torch.isfinite(value)) or not torch.equal(
        exact[~finite].nan_to_num(), value[~finite].nan_to_num()
    ):
        return None
    return (value - exact)[finite]


def _logits(value: Tensor, exact: Tensor) -> tuple[float, float]:
    """Mean over positions of KL(softmax y64 ‖ softmax y) in nats, and the share of positions with the same largest
    logit.
    """
    mine, theirs = torch.log_softmax(exact, -1), torch.log_softmax(value.to(exact.device, exact.dtype), -1)
    kl = (mine.exp() * (mine - theirs)).nan_to_num().sum(-1).mean()
    return max(float(kl), 0.0), float((exact.argmax(-1) == value.to(exact.device).argmax(-1)).double().mean())


def adapter_effect(expected: list[Expected], actual: list[dict[str, Tensor]]) -> tuple[float | None, float | None]:
    """‖y - y64‖ / ‖effect‖ and cos(y - base64, effect), effect = y64 - base64, over all outputs and input sets as one
    vector.

    None, None without an adapter, with an effect of zero, or where the outputs cannot be subtracted.
    """
    error2 = effect2 = kept2 = inner = 0.0
    for want, got in zip(expected, actual, strict=True):
        for name, base in (want.base or {}).items():
            exact, value = want.bounds[name].exact, got[name].to(want.bounds[name].exact)
            if base.shape != exact.shape or value.shape != exact.shape:
                return None, None
            usable = torch.isfinite(exact) & torch.isfinite(base) & torch.isfinite(value)
            effect, kept = (exact - base)[usable], (value - base)[usable]
            error2 += float((kept - effect).abs().square().sum())
            effect2 += float(effect.abs().square().sum())
            kept2 += float(kept.abs().square().sum())
            inner += float((kept * effect.conj()).real.sum())
    if effect2 == 0.0:
        return None, None
    return math.sqrt(error2 / effect2), inner / math.sqrt(effect2 * kept2) if kept2 else 0.0
