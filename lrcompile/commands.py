"""What the commands on a model do: plan, merge, quantize, export, verify, golden. Each returns its exit code."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

import lrcompile
from lrcompile.demo.opening import Opened, open_model, outline
from lrcompile.demo.sources import quiet
from lrcompile.errors import LrcompileError, SpecError
from lrcompile.specs import Spec
from lrcompile.writing import atomic_folder


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
    opened = _adapted(given.model, given.adapter)
    calibration = [opened.inputs(given.inputs, given.text)] if given.inputs or given.text else None
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
    opened = open_model(given.model)
    exclude = names(given.exclude) if given.exclude else None
    double = not given.no_double_quant
    lrcompile.quantize(opened.model, "nf4", block_size=given.block_size, double_quant=double, exclude=exclude)
    with atomic_folder(given.out) as folder:
        opened.save(folder)
    done = quantization_of(opened.model)
    assert done is not None
    print(f"{len(done.quantized)} linear maps as NF4; wrote {given.out}")
    for name, reason in done.spared.items():
        print(f"  {name} stays as it is: {reason}")
    return 0


def export(given: Namespace) -> int:
    quiet()
    if given.genai and not given.use_cache:
        raise LrcompileError("--genai is for a decoder with a cache: give --use-cache too")
    if len(given.adapter) > 1 and given.adapters != "inputs":
        raise LrcompileError("--adapter is given several times: only --adapters inputs keeps more than one apart")
    opened = _adapted(given.model, *given.adapter)
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
    opened = _adapted(given.model, given.adapter)
    print(f"wrote {lrcompile.export_adapter(opened.model, given.file)}")
    print(f"prove it: lrcompile verify {given.model} {given.file} --adapter {given.adapter}")
    return 0


def verify(given: Namespace) -> int:
    quiet()
    opened = _adapted(given.reference, *([given.adapter] if given.adapter else []))
    inputs = opened.inputs(given.inputs, given.text or ["what it computes", "is what was trained, within rounding"])
    file = Path(given.candidate).suffix in (".onnx", ".pt2")
    candidate: Any = given.candidate if file else open_model(given.candidate).model
    base = open_model(given.base).model if given.base else None
    return _report([lrcompile.verify(opened.model, candidate, inputs, base=base)], given.json)


def golden_record(given: Namespace) -> int:
    import lrcompile.golden as golden

    quiet()
    opened = open_model(given.model)
    inputs = opened.inputs(given.inputs, given.text or ["a text whose outputs are kept", "another"])
    golden.record(given.path, opened.model, inputs, pipeline=given.passes, reason=given.reason)
    print(f"wrote {given.path}")
    return 0


def golden_check(given: Namespace) -> int:
    import lrcompile.golden as golden

    quiet()
    model = open_model(given.model).model if given.model else None
    return _report(golden.check(given.path, model, build=given.build), False)


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


def _report(verdicts: list[Any], as_json: bool) -> int:
    if as_json:
        print(
            json.dumps(
                [verdict.to_dict() for verdict in verdicts] if len(verdicts) > 1 else verdicts[0].to_dict(), indent=2
            )
        )
    else:
        print("\n\n".join(map(str, verdicts)))
    return 0 if all(verdict.ok for verdict in verdicts) else 1


def _adapted(model: str, *adapters: str) -> Opened:
    """The model with these adapters (`[NAME=]DIR`), the last one active."""
    opened = open_model(model)
    for each in adapters:
        name, equals, folder = each.partition("=")
        if equals and not Path(each).exists():
            lrcompile.load(opened.model, folder, name=name)
        else:
            lrcompile.load(opened.model, each)
        opened.model.eval()
    return opened


def _spec(given: Namespace) -> Spec:
    if given.spec:
        return Spec.load(given.spec)
    fields = {"rank": given.rank, "alpha": given.alpha, **values(given.set)}
    fields |= {"targets": names(given.targets) if given.targets is not None else None}
    fields |= {"exclude": names(given.exclude) if given.exclude is not None else None}
    return lrcompile.spec(given.method, **{key: value for key, value in fields.items() if value is not None})
