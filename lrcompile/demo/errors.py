"""Texts that cannot be learned from."""

from __future__ import annotations

from lrcompile.errors import LrcompileError


class DataError(LrcompileError, ValueError):
    """Data that cannot be read or cannot be learned from; the message names the file and the line."""
