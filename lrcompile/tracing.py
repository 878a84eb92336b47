"""What captures a forward while it runs: programs for export and graphs for a compiler want different things."""

from __future__ import annotations

import torch

_CONSTANT = torch.__version__ < "2.12"
"""There Dynamo takes `is_exporting()` for true in whatever it captures."""


def exporting() -> bool:
    """Is a program being exported?"""
    return torch.compiler.is_exporting() and not (_CONSTANT and torch.compiler.is_dynamo_compiling())
