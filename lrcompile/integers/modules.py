"""A linear module whose weight is integers in blocks: the class its own is swapped for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import lrcompile.dialect.integers  # noqa: F401  (registers the op)
from lrcompile.hosting import Host, stack, stacked
from lrcompile.integers.blocks import Integers, dequantize_integers

BUFFERS = ("weight_integers", "weight_scales")
_LAYOUT = "_lrcompile_integers"


@dataclass(frozen=True)
class IntegerLayout:
    """What the codes do not say of their weight."""

    in_features: int
    bits: int
    block_size: int
    transposed: bool
    """The module's own weight was `[in, out]`; the codes are of `[out, in]` either way."""
    dtype: torch.dtype
    """The dtype `.weight` answers in: its own before, and what a cast of the module made of that since."""


class IntegerLinear(Host):
    """y = x·Wᵀ + b, W = s·(q − 2^(bits−1)) in x's dtype, codes and scales in buffers that only ever move.

    `.weight` decodes at each read; it is a computed value, so writing to it changes nothing.
    """

    bias: Tensor | None

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        (x,) = args or kwargs.values()
        layout = integer_layout_of(self)
        return torch.ops.lrcompile.integer_linear(
            x, *integers_of(self), self.bias, layout.in_features, layout.bits, layout.block_size, False
        )

    @property
    def weight(self) -> Tensor:
        layout = integer_layout_of(self)
        weight = dequantize_integers(integers_of(self), layout.in_features, layout.bits, layout.dtype)
        return weight.t() if layout.transposed else weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        buffers: dict[str, Tensor] = self._buffers  # type: ignore[attr-defined]
        held = {name: buffers.pop(name) for name in BUFFERS}
        try:
            super()._apply(fn, recurse)  # type: ignore[misc]
            moved = {name: tensor.to(fn(tensor).device) for name, tensor in held.items()}
            dtype = fn(torch.empty(0, dtype=integer_layout_of(self).dtype, device=held[BUFFERS[0]].device)).dtype
        except BaseException:
            buffers.update(held)
            raise
        buffers.update(moved)
        self.__dict__[_LAYOUT] = replace(integer_layout_of(self), dtype=dtype)
        return self

    def extra_repr(self) -> str:
        layout = integer_layout_of(self)
        out = len(integers_of(self).codes)
        return (
            f"in_features={layout.in_features}, out_features={out}, bias={self.bias is not None}, "
            f"int{layout.bits}(block_size={layout.block_size})"
        )

    __repr__ = nn.Module.__repr__


def is_integers(module: nn.Module) -> bool:
    return isinstance(module, IntegerLinear)


def integer_layout_of(module: nn.Module | IntegerLinear) -> IntegerLayout:
    return module.__dict__[_LAYOUT]


def integers_of(module: nn.Module | IntegerLinear) -> Integers:
    return Integers(*(getattr(module, name) for name in BUFFERS))


def attach_integers(module: nn.Module, held: Integers, layout: IntegerLayout) -> None:
    """Put `held` in the place of `module.weight`."""
    del module._parameters["weight"]
    mixins, original = stack(type(module))
    module.__class__ = stacked([*mixins, IntegerLinear], original)
    module.__dict__[_LAYOUT] = layout
    for name, tensor in zip(BUFFERS, held, strict=True):
        module.register_buffer(name, tensor)
