"""One file of numbers, which several runs add to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def keep(path: Path, here: dict[str, Any], key: str, result: dict[str, Any]) -> None:
    """Add a result to those of the same machine and versions, `here`; a file of others is begun anew."""
    found = json.loads(path.read_text()) if path.exists() else {}
    results = found["results"] if {name: found.get(name) for name in here} == here else {}
    path.write_text(json.dumps(here | {"results": results | {key: result}}, indent=1) + "\n")
