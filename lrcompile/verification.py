"""verify: does a candidate compute what the reference means?

    r = max |y - y64| / D         D = largest deviation of float64 replays with ±u·(|x||W|) on every linear map
    e = ‖y - y64‖ / ‖effect‖      effect = y64 - y64 of the base without its adapter

The ladder is float64 of the intended mathematics → the reference in its own dtype → the candidate (or several, in
order); each rung's error is measured against float64, and what it adds against the rung before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from lrcompile.errors import ExportError, VerificationError
from lrcompile.state import acting
from lrcompile.verifying.comparing import Expected
from lrcompile.verifying.float64 import float64_copy, float64_mode, widen_inputs
from lrcompile.verifying.ladder import Ladder
from lrcompile.verifying.manifest import Artefact, artefact
from lrcompile.verifying.outputs import Inputs, aligned, call, input_sets, named_outputs, selected
from lrcompile.verifying.replay import SEEDS, Deviation, Magnitudes, perturbed, unit_roundoff, working_dtype
from lrcompile.verifying.runners import ModuleRunner, Runner, evaluating, runner
from lrcompile.verifying.verdict import Limits, Rung, Verdict
from lrcompile.wrapping import refuse_meta

__all__ = ["Limits", "Rung", "Verdict", "verify"]


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

    An `.onnx` file that takes its adapters as inputs runs with those that are active in the reference (by their names;
    a `lrcompile.run` runs with those it was opened with), after the checks of `run`.

    `base` gives the adapter's effect where the reference no longer knows its adapter (merged for good, reloaded).
    `outputs` restricts the comparison to these names. `locate` looks for the first diverging place: None does when the
    verdict fails. `limits` default to those in the manifest beside an artefact, else `Limits()`.

    An export with a cache is compared on the prompt (`inputs`, an empty past) and on the token after it, logits and
    cache.

    A comparison that fails is a `Verdict` with `.ok` False; one that cannot be made raises `VerificationError`, for an
    adapter's file that is missing or does not fit `AdapterError`.
    """
    if not isinstance(reference, nn.Module):
        raise VerificationError(f"the reference must be an nn.Module, not {type(reference).__name__}")
    if limits is not None and not isinstance(limits, Limits):
        raise VerificationError(f"limits must be lrcompile.Limits(...), got {type(limits).__name__}")
    refuse_meta(reference, "verify", VerificationError)
    sets = input_sets(inputs)
    rungs = dict(candidate) if isinstance(candidate, Mapping) else {"candidate": candidate}
    if not rungs:
        raise VerificationError("the mapping of candidates is empty; give at least one")
    manifests = {name: artefact(value) for name, value in rungs.items()}
    runners = {name: runner(value, manifests[name], acting(reference)) for name, value in rungs.items()}
    if not isinstance(candidate, Mapping):
        runners = {one.label: one for one in runners.values()}
    limits = limits or next((entry.limits for entry in reversed(manifests.values()) if entry.limits), Limits())
    with _as_decoders(manifests, reference, base, sets) as sets:
        return _climbed(reference, runners, sets, manifests, limits, base, outputs, locate)


@contextmanager
def _as_decoders(
    manifests: Mapping[str, Artefact], reference: nn.Module, base: nn.Module | None, sets: list[Inputs]
) -> Iterator[list[Inputs]]:
    """Where a candidate takes and returns its cache, the reference does too, and each prompt is followed by a token."""
    if not any(entry.generation for entry in manifests.values()):
        yield sets
        return
    from lrcompile.deployment.decoding import PAST, decoding, prompt_of, steps

    with ExitStack() as stack:
        try:
            sets = [
                step
                for given in sets
                for step in ([given] if PAST in given else steps(reference, prompt_of(reference, given)))
            ]
            for each in (reference, base):
                if each is not None:
                    stack.enter_context(decoding(each))
        except ExportError as error:
            raise VerificationError(f"the file has a key-value cache, the reference must take one: {error}") from error
        yield sets


def _climbed(
    reference: nn.Module,
    runners: dict[str, Runner],
    sets: list[Inputs],
    manifests: Mapping[str, Artefact],
    limits: Limits,
    base: nn.Module | None,
    outputs: Sequence[str] | None,
    locate: bool | None,
) -> Verdict:
    own = [selected(one, outputs, "the reference") for one in map(ModuleRunner(reference).run, sets)]
    results = {
        name: [aligned(mine, one.run(given), one.label) for mine, given in zip(own, sets, strict=True)]
        for name, one in runners.items()
    }
    shared = [name for name in own[0] if all(name in actual[0] for actual in results.values())]
    uncompared = tuple(name for name in own[0] if name not in shared)

    dtype = working_dtype(reference, sets)
    expected = expectations(reference, sets, unit_roundoff(dtype), base, shared)
    ladder = Ladder(expected, limits)
    for name, actual in [("eager", own), *results.items()]:
        ladder.climb(name, [{output: one[output] for output in shared} for one in actual], judged=actual is not own)
    for entry in manifests.values():
        ladder.failures += entry.stale
    verdict = ladder.verdict(str(dtype).removeprefix("torch."), {name: one.session for name, one in runners.items()})
    verdict = dataclasses.replace(verdict, uncompared=uncompared)
    if not (locate or (locate is None and not verdict.ok)):
        return verdict
    suspect = runners[ladder.first_failed or next(reversed(runners))]
    return _located(verdict, reference, suspect, sets[0], unit_roundoff(dtype))


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
        magnitudes = Magnitudes()
        for seed in SEEDS if bounds else ():
            replayed = _run64(twin, given, outputs, perturbed(roundoff, seed, magnitudes))
            for name, bound in bounds.items():
                bound.update(replayed[name])
        expected.append(Expected(bounds, {name: value for name, value in exact.items() if not _inexact(value)}))
    del twin
    plain = _base_copy(reference, base)
    if plain is not None:
        for want, given in zip(expected, sets, strict=True):
            without = _run64(plain, given, None)
            want.base = {name: value for name, value in aligned(exact, without, "the base").items() if _inexact(value)}
    return expected


def _run64(
    twin: nn.Module, given: Inputs, outputs: Sequence[str] | None, inside: AbstractContextManager[None] | None = None
) -> dict[str, Tensor]:
    with evaluating(twin), float64_mode(), inside or nullcontext():
        return selected(named_outputs(call(twin, widen_inputs(given))), outputs, "the reference")


def _base_copy(reference: nn.Module, base: nn.Module | None) -> nn.Module | None:
    """The float64 copy of what the reference computes without its adapters, or None if it has none."""
    if base is not None:
        return float64_copy(base)
    if "_lrcompile" not in reference.__dict__:
        return None
    from lrcompile.switching import switched_off

    # Copied inside the context, so that a merged reference is copied with the base's bits in place.
    with switched_off(reference):
        return float64_copy(reference)


def _inexact(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _located(verdict: Verdict, reference: nn.Module, one: Runner, given: Inputs, roundoff: float) -> Verdict:
    from lrcompile.verifying.intermediates import first_divergence

    found, note = first_divergence(reference, one, given, roundoff, verdict.limits.bound_ratio)
    note = "; ".join(part for part in (verdict.note, note) if part) or None
    return dataclasses.replace(verdict, first_divergence=found.name if found else None, divergence=found, note=note)
