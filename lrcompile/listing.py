"""`lrcompile methods` and `lrcompile passes`: the registries as tables."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import fields

from lrcompile.errors import SpecError
from lrcompile.recipes import methods, recipe
from lrcompile.recipes.recipe import REQUIRED, Option, Recipe
from lrcompile.tables import render


def list_methods(given: Namespace) -> int:
    """One line a method; imports torch only to count what each trains in a given model."""
    counts = _counts(given.model, given.rank) if given.model else {}
    rows = []
    for name in methods():
        each = recipe(name)
        row = [name, each.summary, ", ".join(each.trains) or "biases", each.merges, "yes" if each.nf4 is None else "no"]
        row += [each.peft or "-", each.paper]
        rows.append([*row[:3], counts[name], *row[3:]] if counts else row)
    columns = ["method", "what it does", "trains", "merges", "NF4 base", "PEFT type", "paper"]
    if counts:
        columns.insert(3, f"parameters in {given.model}")
    notes = [
        "one method in full: lrcompile methods NAME; what each trains in a model: lrcompile methods --model MODEL",
        "every method takes the common fields of lrcompile.spec (rank, alpha, targets, exclude, layers, bias, …) but"
        " those it says it lacks",
    ]
    if given.name is not None:
        print(_in_full(recipe(given.name)))
        return 0
    print(render(columns, rows, notes=notes))
    return 0


def _in_full(each: Recipe) -> str:
    """Everything a recipe says, a line each."""
    rows: list[tuple[str, str]] = [
        ("computes", each.summary),
        ("trains", ", ".join(each.trains) or "biases of the base"),
        *((key, f"{_default(option.default)}; {option.expected}") for key, option in each.options.items()),
        *((key, f"default {value!r}") for key, value in each.defaults.items()),
        *((key, f"it has none: {reason}") for key, reason in each.lacks.items()),
        ("needs data", "apply(model, spec, data=batches)" if each.calibration else ""),
        ("merges", each.merges),
        ("NF4 base", "stores its base so" if each.quantizes_base else each.nf4 or "yes"),
        ("writes W", "yes: remove(model, keep_trained_weights=True)" if each.writes_base else ""),
        ("PEFT type", each.peft or ""),
        ("paper", each.paper),
    ]
    return render((each.name, ""), [row for row in rows if row[1]])


def _default(value: object) -> str:
    return "required" if value is REQUIRED else f"default {value!r}"


def _counts(model: str, rank: int | None) -> dict[str, str]:
    """What each method trains in `model`, read from its config alone."""
    from lrcompile.demo.opening import outline
    from lrcompile.demo.sources import quiet
    from lrcompile.planning import plan
    from lrcompile.specs import spec

    quiet()
    opened, found = outline(model), {}
    for name in methods():
        each = recipe(name)
        required = {key: _least(option) for key, option in each.options.items() if option.default is REQUIRED}
        given = {} if rank is None or "rank" in each.lacks else {"rank": rank}
        try:
            found[name] = f"{plan(opened, spec(name, **required, **given)).trainable:,}"
        except SpecError as error:
            found[name] = f"- ({str(error).split(';')[0]})"
    return found


def _least(option: Option) -> int:
    """A value for a field that must be given and that does not change what trains."""
    return next(value for value in range(1, 100) if option.valid(value))


def list_passes(given: Namespace) -> int:
    """One line a pass: the identity it uses, its options, what it preserves."""
    from lrcompile import passes

    rows = []
    for name in passes.names():
        each = passes.get(name)
        options = ", ".join(f"{field.name.replace('_', '-')}={field.default!r}" for field in fields(each))
        identity = (each.__doc__ or "").strip().splitlines()[0]
        rows.append((name, each.stage, each.preserves, options or "-", identity))
    notes = [
        'write a pipeline as "merge-lora,quantize-nf4{block-size=128}", of passes of the stage export',
        "passes of the stage dynamo run where a model is compiled for training",
    ]
    print(render(("pass", "stage", "preserves", "options", "identity"), rows, notes=notes))
    return 0
