"""What the commands on a model do: plan, merge, quantize, export, verify, golden. Each returns its exit code."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

import lrcompile
from lrcompile.budgets import KINDS, checked_budget
from lrcompile.demo.opening import Opened, open_model, outline
from lrcompile.demo.sources import quiet
from lrcompile.errors import LrcompileError, SpecError
from lrcompile.sides import adapted, compare, open_side, shared_inputs
from lrcompile.specs import Spec
from lrcompile.verifying.page import write_page
from lrcompile.writing import atomic_file, atomic_folder


def plan(given: Namespace) -> int:
    from lrcompile.planning import plan as make_plan

    quiet()
    if given.tokens < 1:
        raise LrcompileError(f"--tokens is {given.tokens}; expected at least 1")
    found = make_plan(outline(given.model), _spec(given), tokens=given.tokens)
    print(json.dumps(found.to_dict(), indent=2) if given.json else found)
    return 0


def merge(given: Namespace) -> int:
    quiet()
    refuse_used(given.out)
    opened = adapted(given.model, given.adapter)
    calibration = _calibration(opened, given)
    limit = {} if given.limit is None else {"limit": given.limit}
    report = lrcompile.merge(
        opened.model, into=given.into, optimise=given.optimise, data=calibration, final=True, **limit
    )
    with atomic_folder(given.out) as folder:
        opened.save(folder)
    print(report)
    print(f"wrote {given.out}")
    return 0


def quantize(given: Namespace) -> int:
    from lrcompile.quantizing import quantization_of

    quiet()
    refuse_used(given.out)
    limit = None if given.budget is None else budget(given.budget)
    if limit is None and (given.inputs or given.text or given.data or given.integer_inputs):
        raise LrcompileError("--data, --text, --inputs and --integer-inputs say what a --budget is measured on")
    if limit is not None and not (given.inputs or given.text or given.data):
        raise LrcompileError("--budget is measured on your data: give --data FILE, --text TEXT or --inputs FILE")
    opened = open_model(given.model)
    lrcompile.quantize(
        opened.model,
        block_size=given.block_size,
        double_quant=not given.no_double_quant,
        exclude=names(given.exclude) if given.exclude else None,
        budget=limit,
        data=_calibration(opened, given),
        integer_inputs=given.integer_inputs,
    )
    with atomic_folder(given.out) as folder:
        opened.save(folder)
    done = quantization_of(opened.model)
    assert done is not None
    allocation = done.allocation
    if not _wrote_json({"out": given.out, **done.to_dict()}, given.json):
        print(f"{len(done.quantized)} linear maps as NF4; wrote {given.out}" if allocation is None else allocation)
        for name, reason in done.spared.items():
            print(f"  {name} stays as it is: {reason}")
        if allocation is not None:
            print(f"wrote {given.out}")
    return 0


def _calibration(opened: Opened, given: Namespace) -> list[Any] | None:
    """What --inputs, or --text and --data, give to measure on; None where they are absent."""
    if given.samples < 1:
        raise LrcompileError(f"--samples is {given.samples}; expected at least 1")
    if given.inputs and (given.text or given.data):
        raise LrcompileError("--inputs holds tensors, --text and --data texts: give one or the other")
    if not (given.inputs or given.text or given.data):
        return None
    return opened.batches(given.inputs, given.text, given.data, given.samples)


def export(given: Namespace) -> int:
    quiet()
    if given.genai and not given.use_cache:
        raise LrcompileError("--genai is for a decoder with a cache: give --use-cache too")
    if len(given.adapter) > 1 and given.adapters != "inputs":
        raise LrcompileError("--adapter is given several times: only --adapters inputs keeps more than one apart")
    opened = adapted(given.model, *given.adapter)
    done = lrcompile.export(
        opened.model,
        given.file,
        opened.inputs(given.inputs, given.text or ["an example of a text", "and a second one, a little longer"]),
        adapters=given.adapters,
        into=given.into,
        quantize=given.quantize,
        nf4_form=given.nf4_form,
        opset=given.opset,
        use_cache=given.use_cache,
    )
    print(f"wrote {done.path}")
    if given.genai:
        print(f"wrote {done.for_genai(opened.tokenizer() if opened.has_tokenizer() else None)}")
    if not given.quantize:
        for option in [f" --adapter {each}" for each in given.adapter] or [""]:
            print(f"prove it: lrcompile verify {given.model} {done.path}{option}")
    return 0


def export_adapter(given: Namespace) -> int:
    quiet()
    opened = adapted(given.model, given.adapter)
    print(f"wrote {lrcompile.export_adapter(opened.model, given.file)}")
    print(f"prove it: lrcompile verify {given.model} {given.file} --adapter {given.adapter}")
    return 0


def verify(given: Namespace) -> int:
    quiet()
    a = open_side(given.reference, base=given.base, adapter=given.adapter, build=given.build)
    b = open_side(given.candidate, base=given.base, build=given.build)
    base = open_side(given.base) if given.base else None
    plain = None if base is None else base.module if base.module is not None else base.file
    inputs = shared_inputs(a, b, given.inputs, given.text)
    verdict = compare(a, b, inputs, base=plain, repro=given.repro, locate=True if given.html else None)
    return _report([verdict], given.json, given.html)


def golden_record(given: Namespace) -> int:
    import lrcompile.golden as golden

    quiet()
    opened = adapted(given.model, *([given.adapter] if given.adapter else []))
    inputs = opened.inputs(given.inputs, given.text or ["a text whose outputs are kept", "another"])
    forms = names(given.forms) if given.forms else []
    golden.record(given.path, opened.model, inputs, pipeline=given.passes, forms=forms, reason=given.reason)
    print(f"wrote {given.path}")
    return 0


def golden_check(given: Namespace) -> int:
    import lrcompile.golden as golden

    quiet()
    model = open_model(given.model).model if given.model else None
    forms = None if given.forms is None else names(given.forms)
    return _report(golden.check(given.path, model, build=given.build, forms=forms), given.json, given.html)


def golden_update(given: Namespace) -> int:
    import lrcompile.golden as golden

    quiet()
    model = open_model(given.model).model if given.model else None
    golden.update(given.path, reason=given.reason, model=model, build=given.build)
    return 0


def names(text: str) -> str | list[str]:
    """A list of names, or the regular expression after `re:`, or "all-linear": what `targets` and `exclude` take."""
    if text.startswith("re:"):
        return text.removeprefix("re:")
    return text if text == "all-linear" else [name.strip() for name in text.split(",") if name.strip()]


_UNITS = {"KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30, "kB": 1e3, "MB": 1e6, "GB": 1e9, "%": 0.01}


def budget(text: str) -> dict[str, float]:
    """`--budget KIND=LIMIT`: bytes may have a unit, a share and an error a percent sign."""
    kind, _, number = text.partition("=")
    unit = next((each for each in _UNITS if number.endswith(each)), "")
    try:
        if kind not in KINDS or (unit not in ("", "%") if kind != "bytes" else unit == "%"):
            raise ValueError
        return checked_budget({kind: float(number.removesuffix(unit)) * _UNITS.get(unit, 1.0)})
    except ValueError as error:  # a SpecError is one, too
        expected = "share=0.2 (of what the weights take now), bytes=25MiB or error=0.02"
        raise SpecError(f"--budget is {text!r}; expected one of {expected}", field="budget") from error


def values(given: Sequence[str]) -> dict[str, Any]:
    """The fields of `--set FIELD=VALUE`, their values read as YAML."""
    found = {}
    for each in given:
        field, equals, text = each.partition("=")
        if not (field and equals) or field == "method":
            raise SpecError(f"--set takes FIELD=VALUE, a field of the spec but its method, got {each!r}", field=field)
        try:
            found[field] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise SpecError(f"--set {each!r}: the value is not YAML", field=field) from error
    return found


def refuse_used(out: str) -> None:
    """A folder is replaced as a whole, so only a new or empty one may be named."""
    if Path(out).is_dir() and any(Path(out).iterdir()):
        raise LrcompileError(f"--out is {out!r}, which exists and is not empty; choose a new folder")


def _report(verdicts: list[Any], as_json: str | None, as_html: str | None) -> int:
    """Print the verdicts, or write them where `--json` and `--html` say ("-": JSON on standard output)."""
    found = [verdict.to_dict() for verdict in verdicts]
    if as_html:
        write_page(verdicts, as_html)
    if not _wrote_json(found if len(found) > 1 else found[0], as_json):
        print("\n\n".join(map(str, verdicts)))
        if len(verdicts) > 1:
            lost = [str(verdict.name) for verdict in verdicts if not verdict.ok]
            hold = f"{len(verdicts) - len(lost)} of {len(verdicts)} hold"
            print("", f"{hold}; not {', '.join(lost)}" if lost else hold, sep="\n")
    return 0 if all(verdict.ok for verdict in verdicts) else 1


def _wrote_json(found: Any, where: str | None) -> bool:
    """Write it to the file that `--json` names, or print it ("-"); was it printed, in the place of a table?"""
    text = json.dumps(found, indent=2, allow_nan=False)
    if where == "-":
        print(text)
    elif where:
        with atomic_file(where) as file:
            file.write_text(text + "\n", encoding="utf-8")
    return where == "-"


def _spec(given: Namespace) -> Spec:
    if given.spec:
        return Spec.load(given.spec)
    fields = {"rank": given.rank, "alpha": given.alpha, **values(given.set)}
    fields |= {"targets": names(given.targets) if given.targets is not None else None}
    fields |= {"exclude": names(given.exclude) if given.exclude is not None else None}
    return lrcompile.spec(given.method, **{key: value for key, value in fields.items() if value is not None})
