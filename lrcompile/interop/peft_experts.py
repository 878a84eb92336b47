"""How PEFT reads a stack of expert weights `[E, d1, d2]` as maps, which has changed twice.

    before 0.19.0   [E, in, out], whatever the module says
    0.19.0          [E, out, in] where the module calls it transposed, [E, in, out] where it does not
    from 0.19.1     as the module's `is_transposed` says

The factors of one layout are those of the transposed map in another; their shapes tell which, unless d1 = d2.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from lrcompile.errors import AdapterError
from lrcompile.interop.peft_matching import Unit
from lrcompile.walking import submodule

Reading = Callable[[bool], bool]
"""Whether PEFT takes a stack for `[E, in, out]`, by whether its module calls it transposed."""


WRITTEN_AS = "0.19.1"
"""The first version that reads stacks as they are written here."""


def current(flag: bool) -> bool:
    return flag


def _until_0_18(flag: bool) -> bool:
    return True


def _of_0_19_0(flag: bool) -> bool:
    return not flag


_READINGS: tuple[Reading, ...] = (current, _of_0_19_0, _until_0_18)


def swapped(model: nn.Module, unit: Unit, reading: Reading = current) -> bool:
    """Are A and B in the file those of the transposed map? Of a raw matrix PEFT always takes `[out, in]`."""
    stack = unit.site.copies is not None
    return unit.site.transposed != (stack and reading(_flag(model, unit)))


def reading_of(
    model: nn.Module,
    adapted: Iterable[Unit],
    shapes: Callable[[Unit], tuple[tuple[int, ...], tuple[int, ...]] | None],
    config: Mapping[str, Any],
) -> Reading:
    """The reading under which a folder was written: by the `shapes` of A and B in it, else by its `peft_version`.

    Raises `AdapterError` where the shapes allow two that mean different maps, and no version is given.
    """
    stacks = [unit for unit in adapted if unit.by_parameter and unit.site.copies is not None]
    there = [(unit, found) for unit in stacks if (found := shapes(unit)) is not None]
    fitting = [each for each in _READINGS if all(_fits(model, unit, each, found) for unit, found in there)]
    meanings = {tuple(swapped(model, unit, each) for unit in stacks) for each in fitting}
    if len(meanings) <= 1:
        return fitting[0] if fitting else current
    version = _version(config.get("peft_version"))
    if version is None:
        raise AdapterError(
            f"the expert weights of {stacks[0].site.name} are square, and PEFT has changed how it reads such stacks"
            " (0.19.0, 0.19.1); add the version that wrote this adapter to its config as peft_version"
        )
    return _until_0_18 if version < (0, 19, 0) else _of_0_19_0 if version < (0, 19, 1) else current


def _fits(model: nn.Module, unit: Unit, reading: Reading, found: tuple[tuple[int, ...], tuple[int, ...]]) -> bool:
    """A `[E·r, in]` and B `[out, r·E]`, or those of the transposed map."""
    features = (unit.site.in_features, unit.site.out_features)
    inside, out = features[::-1] if swapped(model, unit, reading) else features
    A, B = found
    return len(A) == len(B) == 2 and (A[1], B[0]) == (inside, out)


def _flag(model: nn.Module, unit: Unit) -> bool:
    return bool(getattr(submodule(model, unit.site.host), "is_transposed", False))


def _version(given: Any) -> tuple[int, int, int] | None:
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", given) if isinstance(given, str) else None
    return None if found is None else (int(found[1]), int(found[2]), int(found[3] or 0))
