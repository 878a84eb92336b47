"""Place by place: how far a candidate is from float64, what of that it inherited, and what it keeps of the adapter.

    r       = max |y − y64| / D                  the whole error at a place
    r_local = max |y − f(x)| / D_local           x what the candidate itself hands to the place, f in float64
    e       = ‖y − f(x)‖ / ‖f(x) − f₀(x)‖        f₀ the same place of the base: by which share of its effect it is off

f(x) comes from one more float64 run in which every place goes on with the candidate's value instead of its own, so no
error is handed down; D_local from replays of that run, with each value handed over moved by its own rounding. The
candidate is never cut into pieces: what a compiler makes of one node alone need not be what it makes of the whole.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lrcompile.verifying.comparing import difference
from lrcompile.verifying.float64 import float64_copy, float64_mode, widen_inputs
from lrcompile.verifying.intermediates import ENTERING, Found, Shapes, reference_places, values64
from lrcompile.verifying.outputs import Inputs
from lrcompile.verifying.replay import SEEDS, Deviation, Magnitudes, perturbed
from lrcompile.verifying.runners import evaluating
from lrcompile.verifying.verdict import Divergence, Limits, Place

Find = Callable[[Inputs, Shapes], Mapping[str, Found]]


def examine(
    reference: nn.Module, base: nn.Module | None, find: Find, inputs: Inputs, roundoff: float
) -> tuple[Place, ...]:
    """A row for each place that both sides have, in the order in which the reference finishes them.

    `base` is the float64 copy of the model without its adapter.
    """
    expected = reference_places(reference, inputs, roundoff)
    found, values = _met(expected, find, inputs)
    local = forced(float64_copy(reference), inputs, values, roundoff)
    plain = {} if base is None else _forced_once(base, inputs, values)
    rows = []
    for name, value in values.items():
        ratio, largest = deviation_ratio(value, expected[name])
        own = deviation_ratio(value, local[name])[0] if name in local else None
        share, cosine = (
            _effect(value, local[name].exact, plain[name]) if name in local and name in plain else (None, None)
        )
        rows.append(Place(name, ratio, own, largest, share, cosine, found[name].node))
    return tuple(rows)


def local_value(reference: nn.Module, find: Find, inputs: Inputs, roundoff: float, place: str) -> Deviation | None:
    """f(x) and D_local at one place; None if the candidate has no value there."""
    _, values = _met(reference_places(reference, inputs, roundoff), find, inputs)
    return forced(float64_copy(reference), inputs, values, roundoff).get(place)


def submodule_value(
    reference: nn.Module, path: str, given: tuple[tuple[Any, ...], dict[str, Any]], roundoff: float
) -> Deviation:
    """y64 and D of one module called with `given`; of several tensors that it returns, the first floating one."""
    part = float64_copy(reference).get_submodule(path)

    def run(inside: AbstractContextManager[None] | None = None) -> Tensor:
        args, kwargs = widen_inputs(given)
        with evaluating(part), float64_mode(), inside or nullcontext():
            leaves = pytree.tree_leaves(part(*args, **kwargs))
        return next(leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()).detach()

    found = Deviation(run(), roundoff)
    for seed in SEEDS:
        found.update(run(perturbed(roundoff, seed)))
    return found


def _met(
    expected: Mapping[str, Deviation], find: Find, inputs: Inputs
) -> tuple[dict[str, Found], dict[str, Tensor]]:
    """What the candidate has at the reference's places, in their order and shapes; its values in float64."""
    found = find(inputs, {name: place.exact.shape for name, place in expected.items()})
    found = {name: found[name] for name in expected if name in found and _fits(found[name], expected[name])}
    return found, {name: each.value.to(expected[name].exact) for name, each in found.items()}


def _fits(found: Found, place: Deviation) -> bool:
    return found.value.shape == place.exact.shape


def forced(twin: nn.Module, inputs: Inputs, values: Mapping[str, Tensor], roundoff: float) -> dict[str, Deviation]:
    """f(x) and D_local of each place: computed from the candidate's `values` at the places before it."""
    local = {name: Deviation(value, roundoff) for name, value in _forced_once(twin, inputs, values).items()}
    magnitudes = Magnitudes()
    for seed in SEEDS:
        coins = torch.Generator().manual_seed(seed)

        def moved(name: str, value: Tensor, coins: torch.Generator = coins) -> Tensor:
            if name not in values:
                return value
            sign = torch.randint(0, 2, value.shape, generator=coins).to(value) * 2 - 1
            return values[name] * (1 + roundoff * sign)

        replayed = values64(twin, inputs, perturbed(roundoff, seed, magnitudes), moved)
        for name, place in local.items():
            place.update(replayed[name])
    return local


def _forced_once(twin: nn.Module, inputs: Inputs, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # in a copy, as a model may write into what it is handed
    return values64(twin, inputs, swap=lambda name, value: values[name].clone() if name in values else value)


def deviation_ratio(value: Tensor, bound: Deviation) -> tuple[float, float]:
    """r and max |error|; infinite where NaN and infinities do not coincide."""
    error = difference(value, bound)
    largest = math.inf if error is None else float(error.abs().max()) if error.numel() else 0.0
    return bound.ratio(largest), largest


def _effect(value: Tensor, exact: Tensor, base: Tensor) -> tuple[float | None, float | None]:
    if exact.shape != base.shape:
        return None, None
    usable = torch.isfinite(value) & torch.isfinite(exact) & torch.isfinite(base)
    effect, kept = (exact - base)[usable], (value - base)[usable]
    size, left = float(effect.norm()), float(kept.norm())
    if size == 0.0:
        return None, None
    return float((kept - effect).norm()) / size, float(kept @ effect) / (size * left) if left else 0.0


def first_divergence(places: tuple[Place, ...], limits: Limits, allowed: float | None) -> Divergence | None:
    """The first place with r over the limit. Where none is, of those that lost more than `allowed` of their adapter's
    effect the one whose own error is most above rounding: an effect no larger than that has no share to speak of.

    What it inherits is the largest ratio among the places before it.
    """
    inherited = 0.0
    for index, place in enumerate(places):
        if place.bound_ratio > limits.bound_ratio:
            return _divergence(place, inherited, len([p for p in places[: index + 1] if not _enters(p)]))
        inherited = max(inherited, place.bound_ratio)
    lost = [] if allowed is None else [place for place in places if (place.effect_error or 0.0) > allowed]
    if not lost:
        return None
    worst = max(lost, key=lambda place: place.local_ratio or 0.0)
    before = max((place.bound_ratio for place in places[: places.index(worst)]), default=0.0)
    return _divergence(worst, before, len([place for place in places if not _enters(place)]))


def _divergence(place: Place, inherited: float, compared: int) -> Divergence:
    given = {field.name: getattr(place, field.name) for field in dataclasses.fields(place)}
    return Divergence(**given, inherited_ratio=inherited, compared=compared)


def _enters(place: Place) -> bool:
    return place.name.startswith(ENTERING)


def none_found(places: tuple[Place, ...], label: str) -> str:
    """Why there is no first divergence."""
    if not places:
        return f"no first divergence: no value of {label} could be traced to a place in the reference"
    worst = max(places, key=lambda place: place.bound_ratio)
    most = f", the largest r is {worst.bound_ratio:.3g} at {worst.name}" if worst.bound_ratio else ""
    count = len([place for place in places if not _enters(place)])
    return f"no first divergence: all {count} places compared stay within their bounds{most}"
