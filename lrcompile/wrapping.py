"""Models that cannot be rewritten or computed as they are: a wrapper holds what a rewrite below it would silently miss,
and the meta device holds no values.
"""

from __future__ import annotations

import sys

from torch import nn

from lrcompile.errors import AdapterError, LrcompileError
from lrcompile.walking import first_of_each_class, parameters


def refuse_wrapped(model: nn.Module, doing: str) -> None:
    """Raise `AdapterError` with the right order of calls if `model`, or anything in it, is wrapped or sharded."""
    if not isinstance(model, nn.Module):
        raise AdapterError(f"cannot {doing} a {type(model).__name__}: a torch.nn.Module was expected")
    for cls, name in first_of_each_class(model).items():
        if wrapper := _wrapper(cls):
            raise AdapterError(
                f"{name or 'the model'} is wrapped by {wrapper}; {doing} the plain model first and wrap it afterwards"
                " (apply, then DistributedDataParallel, fully_shard or torch.compile)"
            )
    tensor = sys.modules.get("torch.distributed.tensor")
    if tensor is not None:
        for name, parameter in parameters(model):
            if isinstance(parameter, tensor.DTensor):
                raise AdapterError(f"{name} is sharded (DTensor); {doing} the model first, then call fully_shard")


def within(model: nn.Module) -> nn.Module:
    """The model that `torch.compile` wrapped, which is changed and read in its place; any other is itself."""
    compiled = isinstance(model, nn.Module) and _wrapper(type(model)) == "torch.compile"
    return model._orig_mod if compiled else model  # type: ignore[return-value]


def refuse_meta(model: nn.Module, doing: str, error: type[LrcompileError]) -> None:
    """Raise `error` if `model` has shapes only, so that there is nothing to compute."""
    for name, parameter in parameters(model):
        if parameter.is_meta:
            raise error(f"{name} is on the meta device and has no values; load the weights first, then {doing}")


def _wrapper(cls: type) -> str | None:
    for each in cls.__mro__:
        origin = f"{each.__module__}.{each.__qualname__}"
        if origin == "torch._dynamo.eval_frame.OptimizedModule":
            return "torch.compile"
        if each.__name__ in (
            "DataParallel",
            "DistributedDataParallel",
            "FullyShardedDataParallel",
            "FSDPModule",
        ) and each.__module__.startswith("torch."):
            return each.__name__
    return "torch.jit" if cls.__module__.startswith("torch.jit") else None
