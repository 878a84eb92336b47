"""One file of numbers, which several runs add to."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def kept(path: Path) -> dict[str, Any]:
    """What the file holds, nothing if there is none. ValueError if it is not such a file."""
    found = json.loads(path.read_text()) if path.exists() else {"results": {}}
    if not isinstance(found, dict) or not isinstance(found.get("results"), dict):
        raise ValueError("it has no results")
    return found


def keep(path: Path, here: dict[str, Any], key: str, result: dict[str, Any]) -> None:
    """Add a result to those of the same machine and versions, `here`; a file of others is begun anew."""
    found = kept(path)
    results = found["results"] if {name: found.get(name) for name in here} == here else {}
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(json.dumps(here | {"results": results | {key: result}}, indent=1) + "\n")
    os.replace(fresh, path)
