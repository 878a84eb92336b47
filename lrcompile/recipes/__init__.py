"""Every method by name. Built-in ones are listed here; others join through the entry point group `lrcompile.methods`.

An entry point names a module attribute holding a `Recipe`; a name that is taken already is an error, never an override.
"""

from __future__ import annotations

import difflib
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points

from lrcompile.errors import LrcompileError, SpecError
from lrcompile.recipes.recipe import Option as Option
from lrcompile.recipes.recipe import Recipe as Recipe

_BUILT_IN = {
    "adalora": "lrcompile.recipes.adalora",
    "bitfit": "lrcompile.recipes.bitfit",
    "corda": "lrcompile.recipes.corda",
    "delta-lora": "lrcompile.recipes.delta_lora",
    "dora": "lrcompile.recipes.dora",
    "eva": "lrcompile.recipes.eva",
    "galore": "lrcompile.recipes.galore",
    "hira": "lrcompile.recipes.hira",
    "ia3": "lrcompile.recipes.ia3",
    "loftq": "lrcompile.recipes.loftq",
    "lora": "lrcompile.recipes.lora",
    "lora-drop": "lrcompile.recipes.lora_drop",
    "lora+": "lrcompile.recipes.lora_plus",
    "lora-fa": "lrcompile.recipes.lora_fa",
    "lora-ga": "lrcompile.recipes.lora_ga",
    "lora-one": "lrcompile.recipes.lora_one",
    "lora-pro": "lrcompile.recipes.lora_pro",
    "lora-rite": "lrcompile.recipes.lora_rite",
    "lora-sb": "lrcompile.recipes.lora_sb",
    "lora-xs": "lrcompile.recipes.lora_xs",
    "milora": "lrcompile.recipes.milora",
    "olora": "lrcompile.recipes.olora",
    "pissa": "lrcompile.recipes.pissa",
    "plora": "lrcompile.recipes.plora",
    "q-galore": "lrcompile.recipes.q_galore",
    "qlora": "lrcompile.recipes.qlora",
    "qpissa": "lrcompile.recipes.qpissa",
    "rslora": "lrcompile.recipes.rslora",
    "vera": "lrcompile.recipes.vera",
}


@cache
def _plugins() -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group="lrcompile.methods"):
        if point.name in _BUILT_IN or point.name in found:
            raise LrcompileError(f"method {point.name!r} of {point.value!r} is defined already; rename the entry point")
        found[point.name] = point
    return found


def methods() -> tuple[str, ...]:
    """The names `spec(method)` accepts, sorted."""
    return tuple(sorted([*_BUILT_IN, *_plugins()]))


def recipe(name: str) -> Recipe:
    """The recipe called `name`; `SpecError` naming the nearest ones otherwise."""
    if isinstance(name, str) and name in _BUILT_IN:
        found = import_module(_BUILT_IN[name]).RECIPE
    elif isinstance(name, str) and name in _plugins():
        found = _plugins()[name].load()
    else:
        near = difflib.get_close_matches(str(name), methods(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise SpecError(f"unknown method {name!r}{hint} Known methods: {', '.join(methods())}", field="method")
    return found
