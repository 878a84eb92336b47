"""Every pass by name, imported when it is asked for, and the text form of a pipeline.

    merge-lora,quantize-nf4{block-size=128},expand-nf4

Third parties add a pass through the entry point group `lrcompile.passes`; a name that is taken already is an error.
"""

from __future__ import annotations

import difflib
import re
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
    "drop-zero-adapters": "drop_zero_adapters:DropZeroAdapters",
    "expand-lora": "expand_lora:ExpandLora",
    "expand-nf4": "expand_nf4:ExpandNf4",
    "fold-scale": "fold_scale:FoldScale",
    "merge-lora": "merge_lora:MergeLora",
    "quantize-nf4": "quantize_nf4:QuantizeNf4",
}


@cache
def _plugins() -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group="lrcompile.passes"):
        if point.name in _BUILT_IN or point.name in found:
            raise LrcompileError(f"pass {point.name!r} of {point.value!r} is defined already; rename the entry point")
        found[point.name] = point
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
        return _plugins()[key].load()
    near = difflib.get_close_matches(key, names(), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise SpecError(f"unknown pass {name!r}{hint} Known passes: {', '.join(names())}", field="passes")


def parse(text: str) -> Pipeline:
    """The pipeline that `text` spells: names with commas between, options in braces (`-` and `_` are the same)."""
    from lrcompile.passes.pipeline import Pipeline

    return Pipeline(tuple(_parse_one(part) for part in _split(text)))


def _split(text: str) -> list[str]:
    parts = re.findall(r"[^,{}\s]+(?:\{[^{}]*\})?", text)
    if not parts or re.sub(r"[,\s]", "", text) != re.sub(r"[,\s]", "", "".join(parts)):
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
    for pair in filter(None, rest.rstrip("}").split(",")):
        key, equals, value = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or key not in known:
            raise SpecError(f"pass {name!r} has no option {pair!r}; it takes {', '.join(known) or 'none'}", field=key)
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
    else:
        return text
    raise SpecError(f"option {key} of pass {name!r} is {text!r}; expected {expected}", field=key)
