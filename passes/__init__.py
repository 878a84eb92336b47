"""Every pass by name, imported when it is asked for, and the text form of a pipeline.

    merge-lora,quantize-nf4{block-size=128},expand-nf4

Third parties add a pass through the entry point group `lrcompile.passes`; a name that is taken already is an error.
"""

from __future__ import annotations

import difflib
import re
from contextlib import suppress
from dataclasses import fields
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from lrcompile.errors import LrcompileError, SpecError

if TYPE_CHECKING:
    from lrcompile.passes.base import Pass
    from lrcompile.passes.pipeline import Pipeline

_BUILT_IN = {
    "dequantize-nf4": "dequantize_nf4:DequantizeNf4",
    "drop-unit-gains": "drop_unit_gains:DropUnitGains",
    "drop-zero-adapters": "drop_zero_adapters:DropZeroAdapters",
    "expand-gains": "expand_gains:ExpandGains",
    "expand-hadamard": "expand_hadamard:ExpandHadamard",
    "expand-integers": "expand_integers:ExpandIntegers",
    "expand-lora": "expand_lora:ExpandLora",
    "expand-nf4": "expand_nf4:ExpandNf4",
    "expand-slots": "expand_slots:ExpandSlots",
    "fold-factors": "fold_factors:FoldFactors",
    "fold-gains": "fold_gains:FoldGains",
    "fold-scale": "fold_scale:FoldScale",
    "fuse-by-input": "fuse_by_input:FuseByInput",
    "fuse-input-gains": "fuse_input_gains:FuseInputGains",
    "group-by-input": "group_by_input:GroupByInput",
    "hoist-constants": "hoist_constants:HoistConstants",
    "integer-inputs": "integer_inputs:IntegerInputs",
    "integers-from-nf4": "integers_from_nf4:IntegersFromNf4",
    "lower-experts": "lower_experts:LowerExperts",
    "lower-gains": "lower_gains:LowerGains",
    "merge-adapters": "merge_adapters:MergeAdapters",
    "merge-gains": "merge_gains:MergeGains",
    "merge-hadamard": "merge_hadamard:MergeHadamard",
    "merge-input-gains": "merge_input_gains:MergeInputGains",
    "merge-lora": "merge_lora:MergeLora",
    "order-contractions": "order_contractions:OrderContractions",
    "prune-ranks": "prune_ranks:PruneRanks",
    "quantize-nf4": "quantize_nf4:QuantizeNf4",
    "replay-dropout": "replay_dropout:ReplayDropout",
    "stack-adapters": "stack_adapters:StackAdapters",
}


@cache
def _plugins() -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group="lrcompile.passes"):
        key = point.name.replace("_", "-")
        if key in _BUILT_IN or key in found:
            raise LrcompileError(f"pass {point.name!r} of {point.value!r} is defined already; rename the entry point")
        found[key] = point
    return found


def names() -> tuple[str, ...]:
    """The passes there are, sorted."""
    return tuple(sorted([*_BUILT_IN, *_plugins()]))


def get(name: str) -> type[Pass]:
    """The pass called `name`; `SpecError` naming the nearest otherwise."""
    key = name.replace("_", "-")
    if key in _BUILT_IN:
        module, _, attribute = _BUILT_IN[key].partition(":")
        return getattr(import_module(f"lrcompile.passes.{module}"), attribute)
    if key in _plugins():
        return _loaded(key, _plugins()[key])
    near = difflib.get_close_matches(key, names(), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise SpecError(f"unknown pass {name!r}{hint} Known passes: {', '.join(names())}", field="passes")


def _loaded(key: str, point: EntryPoint) -> type[Pass]:
    from lrcompile.passes.base import Pass

    found = point.load()
    if not (isinstance(found, type) and issubclass(found, Pass) and found.name == key):
        raise LrcompileError(
            f"entry point {point.name!r} gives {point.value!r}; expected a subclass of lrcompile.passes.base.Pass "
            f"whose name is {key!r}"
        )
    return found


def parse(text: str) -> Pipeline:
    """The pipeline that `text` spells: names with commas between, options in braces (`-` and `_` are the same)."""
    from lrcompile.passes.pipeline import Pipeline

    return Pipeline(tuple(_parse_one(part) for part in _split(text)))


def _split(text: str) -> list[str]:
    parts = [part.strip() for part in re.split(r",(?![^{}]*\})", text)]  # commas outside braces
    if not all(re.fullmatch(r"[^,{}\s]+(\{[^{}]*\})?", part) for part in parts):
        raise SpecError(
            f"{text!r} is no pipeline: write names with commas, options in braces, as in {_EXAMPLE!r}", field="passes"
        )
    return parts


_EXAMPLE = "merge-lora,quantize-nf4{block-size=128}"


def _parse_one(text: str) -> Pass:
    name, _, rest = text.partition("{")
    cls = get(name)
    known = {f.name: f for f in fields(cls)}
    options: dict[str, Any] = {}
    for pair in rest.rstrip("}").split(",") if rest.strip("} ") else ():
        key, equals, value = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or key not in known:
            takes = ", ".join(f"{each.replace('_', '-')}=…" for each in known) or "none"
            raise SpecError(f"pass {name!r} has no option {pair.strip()!r}; it takes {takes}", field=key)
        if key in options:
            raise SpecError(f"option {key} of pass {name!r} is given twice", field=key)
        options[key] = _value(name, key, value.strip(), known[key].default)
    return cls(**options)


def _value(name: str, key: str, text: str, default: Any) -> Any:
    """Options are read as what their default is."""
    if isinstance(default, bool):
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        expected = "true or false"
    elif isinstance(default, int):
        if re.fullmatch(r"-?\d+", text):
            return int(text)
        expected = "an integer"
    elif isinstance(default, float):
        with suppress(ValueError):
            return float(text)
        expected = "a number"
    else:
        return text
    raise SpecError(f"option {key} of pass {name!r} is {text!r}; expected {expected}", field=key)
