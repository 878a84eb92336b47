"""Changing what a module's forward does without changing the module: its class is swapped for a generated subclass.

Parameters keep their identity, names and bits; hooks, `isinstance`, `state_dict` and gradient checkpointing keep
working. A generated class has no importable name, so instances rebuild through `_rebuild`, which `copy.deepcopy`,
`torch.save` and a fresh process all use.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lrcompile.errors import AdapterError


class Host:
    """First base of every generated class; a mixin derived from it says what the forward does."""

    _lrcompile_original: type[nn.Module]
    _lrcompile_mixin: type[Host]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = object.__reduce_ex__(self, protocol)
        mixins, original = stack(type(self))  # type: ignore[arg-type]
        return (_rebuild, (mixins, original), *reduced[2:])


_generated: dict[tuple[type[Host], type[nn.Module]], type[nn.Module]] = {}


def host_class(mixin: type[Host], original: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `original` whose forward is `mixin`'s; the same class each time it is asked for."""
    key = (mixin, original)
    if key in _generated:
        return _generated[key]
    body = {
        "__module__": original.__module__,
        "__doc__": original.__doc__,
        "_lrcompile_original": original,
        "_lrcompile_mixin": mixin,
    }
    _generated[key] = type(f"{mixin.__name__}{original.__name__}", key, body)
    return _generated[key]


def stack(cls: type[nn.Module]) -> tuple[list[type[Host]], type[nn.Module]]:
    """The mixins of a generated class, outermost first, and the class the user wrote below them."""
    mixins: list[type[Host]] = []
    while "_lrcompile_original" in cls.__dict__:
        mixins.append(cls.__dict__["_lrcompile_mixin"])
        cls = cls.__dict__["_lrcompile_original"]
    return mixins, cls


def stacked(mixins: list[type[Host]], original: type[nn.Module]) -> type[nn.Module]:
    """Inverse of `stack`."""
    for mixin in reversed(mixins):
        original = host_class(mixin, original)
    return original


def _rebuild(mixins: list[type[Host]], original: type[nn.Module]) -> nn.Module:
    cls = stacked(mixins, original)
    return cls.__new__(cls)


def swap(module: nn.Module, mixin: type[Host]) -> None:
    """Give `module` the forward of `mixin`, above the class it has."""
    if "forward" in module.__dict__:
        raise AdapterError(
            f"{type(module).__name__}.forward was replaced on the instance (as accelerate's device hooks do); remove"
            " that patch first"
        )
    module.__class__ = host_class(mixin, type(module))


def restore(module: nn.Module, mixin: type[Host]) -> None:
    """Undo `swap`: the class `module` had before."""
    if not hosted_by(module, mixin):
        raise AdapterError(
            f"{type(module).__name__} is not hosted by {mixin.__name__}: something else changed its class since"
        )
    module.__class__ = type(module)._lrcompile_original  # type: ignore[attr-defined]


def hosted_by(module: nn.Module, mixin: type[Host]) -> bool:
    return getattr(type(module), "_lrcompile_mixin", None) is mixin


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class the user wrote, below every generated one."""
    return stack(type(module))[1]
