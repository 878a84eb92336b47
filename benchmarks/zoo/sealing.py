"""An adapter folder that somebody changed who also put the hashes right, as a hostile one would."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from lrcompile.checkpointing.files import OURS, WEIGHTS, sealed


def resealed(folder: Path) -> None:
    """Make the hashes in `lrcompile.json` those of what is there; nothing where it cannot be read as JSON."""
    try:
        ours = json.loads((folder / OURS).read_bytes())
    except (OSError, ValueError):
        return
    if isinstance(ours, dict) and (folder / WEIGHTS).is_file():
        ours["weights_sha256"] = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
        (folder / OURS).write_text(json.dumps(sealed(ours)))
