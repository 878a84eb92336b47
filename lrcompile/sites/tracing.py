"""Tracing one module's own forward so that the trace computes, at each call, what the forward would.

`fx` runs everything that involves no argument of the call at once and keeps the result: a buffer's function or a random
tensor would be frozen at what it was while tracing. Here such a call becomes a node as well, and what cannot be a node
(a value read into Python, an attribute set on the module) is an error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lrcompile.hosting import original_class

_READS_VALUES = {"item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__complex__"}


class CannotTrace(Exception):
    """Something in the forward that no graph can do again at each call."""


class _Shallow(fx.Tracer):
    """Enters the root's own code only: what submodules do is theirs."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


class _RecordAll(TorchFunctionMode):
    """Makes a node of each torch call that takes no proxy, too."""

    def __init__(self, tracer: fx.Tracer):
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = pytree.tree_leaves((args, kwargs))
        if any(isinstance(leaf, fx.Proxy) for leaf in leaves):
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in _READS_VALUES:
            raise CannotTrace(f"it reads the value of a tensor into Python ({name})")
        if any(isinstance(leaf, Tensor) for leaf in leaves) and _in_place(name):
            raise CannotTrace(f"it changes a tensor of its own in place ({name})")
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor) or isinstance(result, nn.Parameter):
            return result
        if name == "__get__":  # an attribute such as .T or .data
            return self.tracer.create_proxy("call_function", getattr, (args[0], func.__self__.__name__), {})
        return self.tracer.create_proxy("call_function", func, args, kwargs)


def trace(module: nn.Module, constants: dict[str, Any]) -> fx.Graph:
    """The original forward of `module`, whatever class it has now, as a graph of its own operations.

    Arguments in `constants` are fixed, all others are placeholders. Raises whatever the forward raises on proxies, and
    `CannotTrace`; `module` and the random state are as before.
    """
    hosted, before = type(module), dict(vars(module))
    module.__class__ = original_class(module)
    tracer = _Shallow()
    try:
        with torch.random.fork_rng(devices=[]), _RecordAll(tracer):
            graph = tracer.trace(module, constants)
    finally:
        module.__class__ = hosted
        changed = _put_back(module, before)
    if changed:
        raise CannotTrace(_changed_message(changed))
    return graph


def _put_back(module: nn.Module, before: dict[str, Any]) -> list[str]:
    now = vars(module)
    changed = [name for name in {**before, **now} if name not in before or now.get(name) is not before[name]]
    for name in changed:
        now.pop(name, None)
    now.update((name, before[name]) for name in changed if name in before)
    return changed


def _changed_message(names: list[str]) -> str:
    if names[0].startswith("_tensor_constant"):
        return "it uses a tensor that is no attribute of the module"
    return f"it sets self.{names[0]}, which a graph cannot do"


def _in_place(name: str) -> bool:
    if name.endswith("__"):
        return name in ("__setitem__", "__set__") or (name.startswith("__i") and name != "__invert__")
    return name.endswith("_")
