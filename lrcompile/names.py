"""Qualified names, and rules over them: one question costs as many look-ups as the name has parts, however many rules.

Importing it does not import torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator


def beginnings(name: str) -> Iterator[str]:
    """a.b.c → a, a.b, a.b.c: the module's ancestors and itself, but for the root."""
    at = name.find(".")
    while at >= 0:
        yield name[:at]
        at = name.find(".", at + 1)
    yield name


def endings(name: str) -> Iterator[str]:
    """a.b.c → a.b.c, b.c, c: what a suffix at a dot may be."""
    yield name
    at = name.find(".")
    while at >= 0:
        yield name[at + 1 :]
        at = name.find(".", at + 1)


def meant(entries: str | Iterable[str], names: Iterable[str]) -> set[str]:
    """Those of `names` that `entries` mean: a list means whole names and suffixes at a dot, a string is a regular
    expression for whole names.
    """
    if isinstance(entries, str):
        pattern = re.compile(entries)
        return {name for name in names if pattern.fullmatch(name)}
    wanted = frozenset(entries)
    return {name for name in names if not wanted.isdisjoint(endings(name))} if wanted else set()


def within(modules: str | Iterable[str], names: Iterable[str]) -> set[str]:
    """Those of `names` that are one of these modules (see `meant`), or lie in one."""
    if not modules:
        return set()
    names = list(names)
    hit = meant(modules, {each for name in names for each in beginnings(name)})
    return {name for name in names if not hit.isdisjoint(beginnings(name))}


class Patterns:
    """Keys that are regular expressions for how a name ends, at a dot: the rule of PEFT's rank and alpha patterns.

    Most keys are names, escaped or not, often one for each site. These are looked up: in a text of the same length
    that has dots where the key has dots that mean any character.
    """

    def __init__(self, keys: Iterable[str]):
        self._keys = list(keys)
        self._names: dict[int, dict[tuple[bool, tuple[int, ...]], dict[str, list[int]]]] = {}
        """By length, and by whether it is the whole name and where any character will do."""
        self._others: list[tuple[int, re.Pattern[str]]] = []
        for index, key in enumerate(self._keys):
            if is_name(key):
                text, anywhere = _parsed(key)
                tables = self._names.setdefault(len(text), {})
                tables.setdefault((key.startswith("^"), anywhere), {}).setdefault(text, []).append(index)
            else:
                self._others.append((index, re.compile(rf"(.*\.)?({key})$")))

    def hitting(self, name: str) -> list[str]:
        """The keys that hit `name`, in their order."""
        if not self._keys:
            return []
        found = [index for index, pattern in self._others if pattern.match(name)]
        for ending in endings(name):
            for (whole, anywhere), table in self._names.get(len(ending), {}).items():
                if not whole or len(ending) == len(name):
                    found += table.get(_dotted(ending, anywhere), ())
        return [self._keys[index] for index in sorted(found)]

    def idle(self, names: Iterable[str]) -> list[str]:
        """The keys that hit none of `names`, in their order."""
        used = {key for name in names for key in self.hitting(name)} if self._keys else set()
        return [key for key in self._keys if key not in used]


_NAME = re.compile(r"\^?(?:[\w-]|\\?\.|\\-)+")


def is_name(key: str) -> bool:
    """Is this regular expression a name, perhaps anchored or escaped, in which a dot may mean any character?"""
    return _NAME.fullmatch(key) is not None


def _parsed(key: str) -> tuple[str, tuple[int, ...]]:
    """The text, and where in it any character will do."""
    parts = re.findall(r"\\?.", key.removeprefix("^"))
    return "".join(part[-1] for part in parts), tuple(index for index, part in enumerate(parts) if part == ".")


def _dotted(text: str, places: tuple[int, ...]) -> str:
    if all(text[place] == "." for place in places):
        return text
    letters = list(text)
    for place in places:
        letters[place] = "."
    return "".join(letters)
