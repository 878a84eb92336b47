"""Every error a user can meet. Each says what was given, what was expected and what to do; the model is left as it
was.
"""

from __future__ import annotations


class LrcompileError(Exception):
    """Root of every error lrcompile raises on purpose."""


class SpecError(LrcompileError, ValueError):
    """A description that cannot be carried out; `field` names the culprit."""

    def __init__(self, message: str, *, field: str | None = None):
        super().__init__(message)
        self.field = field


class TargetError(SpecError):
    """A target that hits nothing, cannot be adapted, or lies on a path no gradient takes."""

    def __init__(self, message: str, *, field: str | None = "targets"):
        super().__init__(message, field=field)


class AdapterError(LrcompileError):
    """An adapter that is missing, present already, or does not fit this model."""


class ModelError(LrcompileError, ValueError):
    """A model that cannot be found, read, written or used; the message says where it was looked for."""


class MergeError(LrcompileError):
    """A fold that cannot be done, or that rounding would erase."""


class ExportError(LrcompileError):
    """A model that cannot be captured, lowered or written."""


class VerificationError(LrcompileError):
    """A comparison that cannot be made (not one that fails: that is a `Verdict`)."""


class MissingDependencyError(LrcompileError, ImportError):
    """An optional package is missing; the message names the extra that installs it."""


def require(package: str, extra: str):
    """Import `package` or say which extra brings it."""
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingDependencyError(
            f"{package!r} is needed here and could not be imported ({error}); install it with: pip install"
            f" 'lrcompile[{extra}]'"
        ) from error
