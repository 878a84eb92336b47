"""A linear module whose weight an adapter holds in INT8: the class its own is swapped for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrcompile.dialect.q_galore  # noqa: F401  (registers the ops)
from lrcompile.hosting import Host, stack, stacked
from lrcompile.int8.groups import Groups, dequantize_groups
from lrcompile.tracing import exporting

_ADAPTERS = "lrcompile_adapters"


class Holder(Protocol):
    """What holds the weight."""

    weight_shape: tuple[int, ...]
    weight_dtype: torch.dtype

    def held(self) -> Groups: ...


class Int8Linear(Host):
    """y = x·dq(W)ᵀ + b. `.weight` dequantizes at each read; writing to that value changes nothing."""

    bias: Tensor | None

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        (x,) = args or kwargs.values()
        if exporting():  # an op of ours in a file would not load in a fresh process
            return F.linear(x, self.weight.t() if _transposed(self) else self.weight, self.bias)
        holder = holder_of(self)
        return torch.ops.lrcompile.int8_linear.default(
            x, *holder.held(), self.bias, *holder.weight_shape, _transposed(self), holder.weight_dtype
        )

    @property
    def weight(self) -> Tensor:
        holder = holder_of(self)
        return dequantize_groups(holder.held(), holder.weight_shape, 8, holder.weight_dtype)

    def extra_repr(self) -> str:
        rows, columns = holder_of(self).weight_shape
        out_features, in_features = (columns, rows) if _transposed(self) else (rows, columns)
        return f"in_features={in_features}, out_features={out_features}, bias={self.bias is not None}, int8"

    __repr__ = nn.Module.__repr__


def is_int8(module: nn.Module) -> bool:
    return isinstance(module, Int8Linear)


def holder_of(module: Any) -> Holder:
    """The adapter that holds the weight; there is one, since no other may join it."""
    adapters = module._modules[_ADAPTERS]["weight"]
    return next(adapters[name] for name in adapters if adapters[name].holds_weight)


def hand_over(module: nn.Module) -> nn.Parameter:
    """Let an adapter of `module` hold its weight, which is returned, from now on."""
    weight = module._parameters.pop("weight")
    assert weight is not None
    mixins, original = stack(type(module))
    module.__class__ = stacked([*mixins, Int8Linear], original)
    return weight


def hand_back(module: nn.Module, weight: nn.Parameter) -> None:
    """Undo `hand_over`, the parameters in the order they had."""
    mixins, original = stack(type(module))
    module.__class__ = stacked([mixin for mixin in mixins if mixin is not Int8Linear], original)
    others = dict(module._parameters)
    module._parameters.clear()
    module._parameters.update({"weight": weight, **others})


@contextmanager
def plain_weights(model: nn.Module) -> Iterator[None]:
    """Within the block every weight held in INT8 is a plain parameter of its module, as a captured graph needs it."""
    held = [module for module in model.modules() if is_int8(module)]
    try:
        for module in held:
            weight: Any = module.weight
            hand_back(module, nn.Parameter(weight, requires_grad=False))
        yield
    finally:
        for module in held:
            if not is_int8(module):
                hand_over(module)


def _transposed(module: Any) -> bool:
    return not isinstance(module, nn.Linear)
