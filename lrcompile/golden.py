"""Goldens: stored inputs and outputs against which every later build is checked.

A case is a folder with the model's tensors and configuration, inputs, and the outputs of the eager model. A check
computes y64 and D anew and holds both what was recorded and what is computed now to r = max|y - y64| / D: no stored
tolerance has to fit another machine, and neither side may drift.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lrcompile.errors import LrcompileError, VerificationError
from lrcompile.progress import shown
from lrcompile.verification import verify
from lrcompile.verifying.golden_files import (
    DATA,
    WEIGHTS,
    Case,
    cases,
    changed_files,
    environment,
    input_sets_of,
    outputs_of,
    pack,
    read_case,
    read_tensors,
    refuse_nan,
    write_case,
)
from lrcompile.verifying.golden_forms import check_forms, through
from lrcompile.verifying.golden_models import built, describe, differing, furnish, rebuild, tensors_of
from lrcompile.verifying.outputs import Inputs, input_sets
from lrcompile.verifying.runners import ModuleRunner, RecordedRunner
from lrcompile.verifying.verdict import Limits, Verdict

__all__ = ["check", "record", "update"]


def record(
    path: str | os.PathLike[str],
    model: nn.Module,
    inputs: Inputs | list[Inputs],
    *,
    pipeline: str | None = None,
    forms: Sequence[str] = (),
    reason: str,
    limits: Limits | None = None,
    limits_reason: str = "defaults of lrcompile.Limits",
) -> None:
    """Store weights, configuration, `inputs` and the eager outputs of `model` as the case folder `path`, atomically.

    `pipeline` names passes (`"merge-lora,expand-lora"`) to run on the captured model at each check, `forms` what else
    it is put into there: "merged", "onnx", "onnx-inline", "onnx-inputs", "onnx-nf4", "pt2". Adapters and quantized maps
    of ours are stored with their specs. Raises `VerificationError` for a case that exists (`update` changes
    one), a missing reason, or an input or setting that has no plain form.
    """
    folder = Path(path)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise VerificationError(f"{folder} exists; golden.update changes a case, and says what changed")
    kept = limits or Limits()
    _write(folder, model, input_sets(inputs), _stated(reason), pipeline, check_forms(forms), kept, limits_reason, [])


def check(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    build: str | None = None,
    forms: Sequence[str] | None = None,
) -> list[Verdict]:
    """One verdict a case, one for its pipeline and one for each of its forms: do the recorded outputs and those
    computed now lie within r·D?

    `path` is a case or a folder of cases. A `transformers` case is rebuilt from its configuration; for others give
    `model`, judged as it is, or `build="package.module:function"`, called for a model that gets the stored tensors. A
    mismatch is a verdict with `.ok` False. A case that is malformed, of another version, or needs a model that was not
    given raises `VerificationError`. Of the forms that a case asks for, `forms` keeps these (None: all).
    """
    wanted = None if forms is None else check_forms(forms)
    if model is not None and build is not None:
        raise VerificationError("give model or build, not both")
    folders = cases(path)
    return [
        verdict
        for folder in shown(folders, "checking goldens", len(folders))
        for verdict in _check(folder, model, build, wanted)
    ]


def update(
    path: str | os.PathLike[str],
    *,
    reason: str,
    model: nn.Module | None = None,
    build: str | None = None,
    limits: Limits | None = None,
) -> list[Verdict]:
    """Print the drift of each case, then store what is computed now in its place; returns the verdicts printed.

    `model` replaces the stored weights as well. `limits` may only tighten. The reason and the drift stay in the
    manifest.
    """
    reason = _stated(reason)
    folders = cases(path)
    old = {folder: read_case(folder) for folder in folders}
    for folder, case in old.items():
        wider = (limits or Limits()).loosens(Limits.from_dict(case.limits)) if limits else []
        if wider:
            raise VerificationError(
                f"{folder}: an update never loosens a limit ({', '.join(wider)}); record a new case instead"
            )
        if changed := changed_files(folder, case):
            raise VerificationError(f"{folder}: {'; '.join(changed)}; restore it or record a new case")
    verdicts = []
    for folder, case in old.items():
        found = _check(folder, model, build, None)
        verdicts += found
        print(*found, sep="\n")
        weights, data = read_tensors(folder / WEIGHTS), read_tensors(folder / DATA)
        new = model if model is not None else _model(case, weights, build)
        entry = {
            "reason": reason,
            "held": all(found),
            "drift": [[rung.name, str(rung.bound_ratio)] for rung in found[0].rungs],
        }
        sets = input_sets_of(folder, case, data)
        kept = limits or Limits.from_dict(case.limits)
        _write(
            folder, new, sets, case.reason, case.pipeline, case.forms, kept, case.limits_reason, [*case.updates, entry]
        )
    return verdicts


def _write(
    folder: Path,
    model: nn.Module,
    sets: list[Inputs],
    reason: str,
    pipeline: str | None,
    forms: list[str],
    limits: Limits,
    limits_reason: str,
    updates: list[dict[str, Any]],
) -> None:
    if pipeline is not None:
        from lrcompile import passes

        passes.parse(pipeline)
    architecture, adapters, quantization = describe(model)
    outputs = [ModuleRunner(model).run(given) for given in sets]
    refuse_nan(folder, outputs)
    data: dict[str, Tensor] = {}
    packed = [pack(given, f"inputs/{index}", data) for index, given in enumerate(sets)]
    for index, named in enumerate(outputs):
        data |= {f"outputs/{index}/{name}": value for name, value in named.items()}
    case = Case(
        reason=reason,
        model=architecture,
        inputs=packed,
        outputs=[list(named) for named in outputs],
        limits=limits.to_dict(),
        limits_reason=limits_reason,
        environment=environment(),
        adapters=adapters,
        quantization=quantization,
        pipeline=pipeline,
        forms=forms,
        updates=updates,
    )
    write_case(folder, case, tensors_of(model), data)


def _check(folder: Path, model: nn.Module | None, build: str | None, forms: Sequence[str] | None) -> list[Verdict]:
    case = read_case(folder)
    limits = Limits.from_dict(case.limits)
    changed = changed_files(folder, case)
    if changed:
        return [_failed(str(folder), limits, changed)]
    weights, data = read_tensors(folder / WEIGHTS), read_tensors(folder / DATA)
    now = model if model is not None else _model(case, weights, build)
    sets, recorded = input_sets_of(folder, case, data), outputs_of(folder, case, data)
    parts: dict[str, Callable[[], Verdict]] = {"": partial(_as_recorded, case, now, weights, sets, recorded, limits)}
    if case.pipeline is not None:
        parts[f" through {case.pipeline}"] = partial(_through_passes, now, sets, case.pipeline, limits)
    for form in case.forms if forms is None else [each for each in case.forms if each in forms]:
        parts[f" as {form}"] = partial(through, form, now, sets, limits)
    return [_judged(f"{folder}{part}", judge, limits) for part, judge in parts.items()]


def _judged(name: str, judge: Callable[[], Verdict], limits: Limits) -> Verdict:
    try:
        return dataclasses.replace(judge(), name=name)
    except LrcompileError as error:
        return _failed(name, limits, [f"it cannot be compared: {error}"])


def _as_recorded(
    case: Case,
    now: nn.Module,
    weights: dict[str, Tensor],
    sets: list[Inputs],
    recorded: list[dict[str, Tensor]],
    limits: Limits,
) -> Verdict:
    verdict = verify(now, {"recorded": RecordedRunner(recorded), "now": now}, sets, limits=limits)
    return dataclasses.replace(verdict, note=_note(case, now, weights, verdict))


def _model(case: Case, weights: dict[str, Tensor], build: str | None) -> nn.Module:
    return rebuild(case, weights) if build is None else furnish(built(build), case, weights)


def _through_passes(model: nn.Module, sets: list[Inputs], pipeline: str, limits: Limits) -> Verdict:
    """The captured model after the passes, held to the limits of the case: what an approximate pass may cost is theirs
    to say (`declared_error`).
    """
    from lrcompile import passes
    from lrcompile.deployment.capture import capture
    from lrcompile.passes.base import Program

    program = Program(capture(model, sets[0]).program, model)
    passes.parse(pipeline).run(program)
    return verify(model, program.module(), sets, limits=limits)


def _note(case: Case, now: nn.Module, weights: dict[str, Tensor], verdict: Verdict) -> str | None:
    """Which of the things that may explain a drift differ from the recording."""
    here = environment()
    notes = [
        f"recorded with {key} {value}, now {here.get(key)}"
        for key, value in case.environment.items()
        if here.get(key) != value
    ]
    other = [] if verdict.ok else differing(now, weights)
    if other:
        notes.append(
            f"{len(other)} tensors are not the recorded ones: {', '.join(other[:5])}{'…' if len(other) > 5 else ''}"
        )
    return "; ".join([*notes, *([verdict.note] if verdict.note else [])]) or None


def _failed(name: str, limits: Limits, reasons: list[str]) -> Verdict:
    return Verdict(
        ok=False,
        bound_ratio=float("inf"),
        adapter_relative_error=None,
        effect_cosine=None,
        first_divergence=None,
        rungs=(),
        outputs=(),
        limits=limits,
        failures=tuple(reasons),
        name=name,
    )


def _stated(reason: str) -> str:
    if not isinstance(reason, str) or not reason.strip():
        raise VerificationError("a golden needs a reason: why this case exists, or why it changes")
    return reason.strip()
