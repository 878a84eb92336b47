"""A model that is a symbolic link lies where the link points, with what belongs to it beside it there."""

from __future__ import annotations

import os
from pathlib import Path


def followed(path: str | os.PathLike[str]) -> Path:
    """`path`, or what it points at if that goes by the same suffix; where it does not, as in a cache whose names are
    hashes, the link itself is the model.
    """
    given = Path(path)
    target = Path(os.path.realpath(given)) if given.is_symlink() else given
    return target if target.suffix == given.suffix else given
