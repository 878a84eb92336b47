"""JSON from outside: bounded in size, each key once, an object at the top."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from lrcompile.errors import VerificationError

_MAX_BYTES = 16 << 20


def read_object(path: Path, *, schema: int | None = None) -> dict[str, Any]:
    """The object in `path`; with `schema`, only of that version."""
    try:
        with path.open("rb") as handle:
            text = handle.read(_MAX_BYTES + 1)
    except OSError as error:
        raise VerificationError(f"{path} cannot be read: {error}") from error
    if len(text) > _MAX_BYTES:
        raise VerificationError(f"{path} is larger than {_MAX_BYTES} bytes; no manifest is")
    data = parse_object(text, str(path))
    if schema is not None and (type(data.get("schema")) is not int or data["schema"] != schema):
        raise VerificationError(f"{path} has schema {data.get('schema')!r}; this version reads schema {schema}")
    return data


def parse_object(text: bytes, where: str) -> dict[str, Any]:
    """The object that `text` holds; `where` names it in errors."""
    try:
        data = json.loads(text.decode("utf-8"), object_pairs_hook=_once, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        raise VerificationError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise VerificationError(f"{where} holds a {type(data).__name__}, an object was expected")
    return data


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return data


def _finite(text: str) -> float:
    raise ValueError(f"{text} is not a number in JSON")
