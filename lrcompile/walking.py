"""What a model consists of, by qualified name, in one list.

`named_modules` hands each name through as many generators as the model is deep, and `get_submodule` asks each step
twice by attribute: of a model with thousands of modules, that is most of what `apply` would take.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lrcompile.adapters import ADAPTERS
from lrcompile.errors import AdapterError


def modules(model: nn.Module, *, adapters: bool = True) -> list[tuple[str, nn.Module]]:
    """As `named_modules`: each module once, parents first; without `adapters` and what they hold where so wished."""
    out, seen = [], set()
    stack: list[tuple[str, nn.Module]] = [("", model)]
    while stack:
        name, module = pair = stack.pop()
        if module in seen:
            continue
        seen.add(module)
        out.append(pair)
        if module._modules:
            stack += _children(name, module, adapters)
    return out


def every_name(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module of the base with all the names it goes by, in the order of `modules`."""
    out: dict[nn.Module, list[str]] = {}
    stack: list[tuple[str, nn.Module]] = [("", model)]
    while stack:
        name, module = stack.pop()
        out.setdefault(module, []).append(name)
        if module._modules:
            stack += _children(name, module, False)
    return out


def first_of_each_class(model: nn.Module) -> dict[type[nn.Module], str]:
    """The classes of the modules, each with the name of the first of them."""
    out: dict[type[nn.Module], str] = {}
    for name, module in modules(model):
        out.setdefault(type(module), name)
    return out


def parameters(model: nn.Module, *, adapters: bool = True) -> list[tuple[str, nn.Parameter]]:
    """As `named_parameters`: each once."""
    return _held("_parameters", model, adapters)


def buffers(model: nn.Module, *, adapters: bool = True) -> list[tuple[str, Tensor]]:
    """As `named_buffers`: each once."""
    return _held("_buffers", model, adapters)


def submodule(model: nn.Module, name: str) -> nn.Module:
    """The module that goes by this name."""
    module = model
    for part in name.split(".") if name else ():
        child = module._modules.get(part)
        if child is None:
            raise AdapterError(f"this {type(model).__name__} has no module {name!r} (any more)")
        module = child
    return module


def _held(kind: str, model: nn.Module, adapters: bool) -> list[tuple[str, Any]]:
    out, seen = [], set()
    for prefix, module in modules(model, adapters=adapters):
        for local, tensor in module.__dict__[kind].items():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                out.append((f"{prefix}.{local}" if prefix else local, tensor))
    return out


def _children(name: str, module: nn.Module, adapters: bool) -> list[tuple[str, nn.Module]]:
    """The last first, as a stack takes them."""
    prefix = f"{name}." if name else ""
    return [
        (prefix + local, child)
        for local, child in reversed(module._modules.items())
        if child is not None and (adapters or local != ADAPTERS)
    ]
