"""verify: does a candidate compute what the reference means?

    r = max |y - y64| / D         D = largest deviation of float64 replays with ±u·(|x||W|) on every linear map
    e = ‖y - y64‖ / ‖effect‖      effect = y64 - y64 of the base without its adapter

The ladder is float64 of the intended mathematics → the reference in its own dtype → the candidate (or several, in
order); each rung's error is measured against float64, and what it adds against the rung before. Where no side is a
module there is no float64: the reference's own outputs take its place, and D is measured on an ONNX graph
(`lrcompile.verifying.references`).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lrcompile.errors import ExportError, VerificationError
from lrcompile.links import followed
from lrcompile.progress import status
from lrcompile.state import acting
from lrcompile.verifying.comparing import Expected
from lrcompile.verifying.ladder import Ladder
from lrcompile.verifying.manifest import Artefact, artefact
from lrcompile.verifying.outputs import Inputs, aligned, input_sets
from lrcompile.verifying.places import first_divergence, none_found
from lrcompile.verifying.references import ModuleReference, Reference, file_reference
from lrcompile.verifying.runners import ModuleRunner, PackageRunner, Runner, runner
from lrcompile.verifying.verdict import Limits, Rung, Verdict
from lrcompile.wrapping import refuse_meta

__all__ = ["Limits", "Rung", "Verdict", "verify"]


def verify(
    reference: Any,
    candidate: Any,
    inputs: Inputs | list[Inputs],
    *,
    limits: Limits | None = None,
    base: Any = None,
    outputs: Sequence[str] | None = None,
    locate: bool | None = None,
    repro: str | os.PathLike[str] | None = None,
) -> Verdict:
    """max |y - y64| ≤ 16·D for every floating output, ‖y - y64‖ ≤ 0.05·‖adapter's effect‖, integers equal, NaN and
    infinities in place.

    `reference` is an eager module, an `fx.GraphModule` or an exported program. `candidate` is a module, a graph, an
    exported program, a path to `.onnx` or `.pt2`, or a mapping of names to these: the rungs in order, all held to the
    limits. `inputs` is a dict (kwargs), a tuple (args) or a list of several. All run in evaluation mode.

    `reference` may also be a path to `.onnx` or `.pt2`. It has no float64, so candidates are held to its own outputs,
    with D measured in ONNX Runtime on the first side that is an ONNX graph; without one there is no bound, an error.

    An `.onnx` file that takes its adapters as inputs runs with those that are active in the reference (by their names;
    a `lrcompile.run` runs with those it was opened with), after the checks of `run`.

    `base` gives the adapter's effect where the reference no longer knows its adapter (merged for good, reloaded, a
    file): of a module a module, of a file a file. `outputs` restricts the comparison to these names. `locate` measures
    every place of the model (`Verdict.places`) and looks for the first diverging one: None does when the verdict fails.
    `repro` is a new folder for the smallest part that shows a failure, runnable without lrcompile. `limits` default to
    those in the manifest beside a candidate, then beside the reference, else `Limits()`.

    An export with a cache is compared on the prompt (`inputs`, an empty past) and on the token after it, logits and
    cache.

    A comparison that fails is a `Verdict` with `.ok` False; one that cannot be made raises `VerificationError`, for an
    adapter's file that is missing or does not fit `AdapterError`.
    """
    if limits is not None and not isinstance(limits, Limits):
        raise VerificationError(f"limits must be lrcompile.Limits(...), got {type(limits).__name__}")
    if repro is not None:
        from lrcompile.verifying.repro import refuse_used

        refuse_used(repro)
    sets = input_sets(inputs)
    reference, base = _lying(reference), _lying(base)
    given = candidate if isinstance(candidate, Mapping) else {"candidate": candidate}
    rungs = {name: _lying(value) for name, value in given.items()}
    if not rungs:
        raise VerificationError("the mapping of candidates is empty; give at least one")
    manifests = {name: artefact(value) for name, value in rungs.items()}
    active = acting(reference) if isinstance(reference, nn.Module) else {}
    runners = {name: runner(value, manifests[name], active) for name, value in rungs.items()}
    if not isinstance(candidate, Mapping):
        runners = {one.label: one for one in runners.values()}
    described = [artefact(reference), *manifests.values()]
    limits = limits or next((entry.limits for entry in reversed(described) if entry.limits), Limits())
    with _as_decoders(manifests, reference, base, sets) as sets:
        return _climbed(reference, runners, sets, described, limits, base, outputs, locate, repro)


def _lying(side: Any) -> Any:
    return followed(side) if isinstance(side, str | os.PathLike) else side


@contextmanager
def _as_decoders(
    manifests: Mapping[str, Artefact], reference: Any, base: Any, sets: list[Inputs]
) -> Iterator[list[Inputs]]:
    """Where a candidate takes and returns its cache, a module that is the reference does too, and each prompt is
    followed by a token.
    """
    if not any(entry.generation for entry in manifests.values()) or not isinstance(reference, nn.Module):
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
    reference: Any,
    runners: dict[str, Runner],
    sets: list[Inputs],
    described: Sequence[Artefact],
    limits: Limits,
    base: Any,
    outputs: Sequence[str] | None,
    locate: bool | None,
    repro: str | os.PathLike[str] | None,
) -> Verdict:
    from lrcompile.deployment.describing import versions

    judge, own_session = _judge(reference, base, sets, list(runners.values()))
    own = judge.own(sets, outputs)
    results = {}
    for name, one in runners.items():
        with status(f"running {name}"):
            results[name] = [aligned(mine, one.run(given), one.label) for mine, given in zip(own, sets, strict=True)]
    shared = [name for name in own[0] if all(name in actual[0] for actual in results.values())]
    uncompared = tuple(name for name in own[0] if name not in shared)
    own = [{name: each[name] for name in shared} for each in own]

    with status(f"what rounding may do to {judge.label.removeprefix('reference: ')}"):
        ladder = Ladder(judge.expected(sets, own), limits, judge.exact)
    ladder.start(own, shown=judge.steps)
    for name, actual in results.items():
        choices, expected = _choices(judge, runners[name], sets, own, ladder)
        outputs_of = [{output: one[output] for output in shared} for one in actual]
        ladder.climb(name, outputs_of, choices=choices, expected=expected)
    ladder.failures += [sentence for entry in described for sentence in entry.stale]
    session = own_session | {name: one.session for name, one in runners.items()}
    sizes = {judge.label: judge.size} | {name: getattr(one, "size", None) for name, one in runners.items()}
    verdict = dataclasses.replace(
        ladder.verdict(judge.dtype, session), uncompared=uncompared, sizes=sizes, versions=versions()
    )
    if not verdict.ok and isinstance(judge, ModuleReference) and judge.draws(sets[0]):
        note = (
            f"{judge.label} draws random numbers in evaluation too (a dropout that ignores it?): switch that off, for"
            " there is no one function that it computes"
        )
        verdict = dataclasses.replace(verdict, note="; ".join(filter(None, (verdict.note, note))))
    if not (locate or repro is not None or (locate is None and not verdict.ok)):
        return verdict
    suspect = runners[ladder.first_failed or next(reversed(runners))]
    with status(f"measuring every place of {suspect.label}"):
        verdict = _located(verdict, judge, suspect, sets[0], ladder.allowed)
    if repro is not None and not verdict.ok:
        from lrcompile.verifying.repro import write_repro

        write_repro(repro, verdict, judge, suspect, sets[0])
    return verdict


def _choices(
    judge: Reference, one: Runner, sets: list[Inputs], own: list[dict[str, Tensor]], ladder: Ladder
) -> tuple[list[list[Tensor]] | None, list[Expected] | None]:
    """What the routers of a candidate take, and what is right there, where it is not what the reference's take."""
    find = getattr(one, "choices", None)
    if find is None or not any(want.choices for want in ladder.expected):
        return None, None
    taken = [find(given) for given in sets]
    pairs = list(zip(taken, ladder.expected, strict=True))
    if any([each.shape for each in mine] != [each.shape for each in want.choices] for mine, want in pairs):
        return None, None  # a graph that was rewritten may sort where the model did not, or choose in another form
    as_expected = all(all(map(torch.equal, mine, want.choices)) for mine, want in pairs)
    return taken, None if as_expected else judge.expected(sets, own, taken)


def _judge(
    reference: Any, base: Any, sets: list[Inputs], runners: list[Runner]
) -> tuple[Reference, dict[str, dict[str, Any]]]:
    """The reference, and what its own run is to be recorded under."""
    if isinstance(reference, torch.export.ExportedProgram):
        reference = reference.module()
    if isinstance(reference, nn.Module):
        refuse_meta(reference, "verify", VerificationError)
        if base is not None and not isinstance(base, nn.Module):
            raise VerificationError(f"the base of a module is a module, not {type(base).__name__}")
        judge: Reference = ModuleReference(reference, sets, base)
        return judge, {judge.label: ModuleRunner(reference).session}
    if not isinstance(reference, str | os.PathLike | Runner):
        raise VerificationError(
            "the reference must be an nn.Module, an exported program or a path to .onnx or .pt2, "
            f"not {type(reference).__name__}"
        )
    values = runner(reference, artefact(reference))
    plain = None if base is None else runner(base, artefact(base))
    return file_reference(values, runners, plain), {f"reference: {values.label}": values.session}


def _located(verdict: Verdict, judge: Reference, one: Runner, given: Inputs, allowed: float | None) -> Verdict:
    if isinstance(one, PackageRunner) and isinstance(judge, ModuleReference):
        from lrcompile.verifying.packages import locate

        places, found, note = locate(judge, one, given, verdict.limits)
    else:
        seen = judge.places(one, given)
        places = () if isinstance(seen, str) else seen
        found = first_divergence(places, verdict.limits, None if verdict.ok else allowed)
        note = seen if isinstance(seen, str) else None if found else none_found(places, one.label)
    note = "; ".join(part for part in (verdict.note, note) if part) or None
    return dataclasses.replace(
        verdict, first_divergence=found.name if found else None, divergence=found, places=places, note=note
    )
