"""A linear module whose weight is integers in blocks: the class its own is swapped for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import lrcompile.dialect.integers  # noqa: F401  (registers the op)
from lrcompile.coded import CodedLinear, Layout, attach_coded, coded_layout
from lrcompile.integers.blocks import Integers, dequantize_integers


@dataclass(frozen=True)
class IntegerLayout(Layout):
    """The codes are of `[out, in]` whether or not the weight was transposed."""

    bits: int


class IntegerLinear(CodedLinear):
    """W = s·(q − 2^(bits−1)) in x's dtype."""

    PARTS = ("weight_integers", "weight_scales")

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

    def form(self) -> str:
        layout = integer_layout_of(self)
        return f"int{layout.bits}(block_size={layout.block_size})"


def is_integers(module: nn.Module) -> bool:
    return isinstance(module, IntegerLinear)


def integer_layout_of(module: nn.Module | IntegerLinear) -> IntegerLayout:
    return coded_layout(module)


def integers_of(module: nn.Module | IntegerLinear) -> Integers:
    return Integers(*(getattr(module, name) for name in IntegerLinear.PARTS))


def attach_integers(module: nn.Module, held: Integers, layout: IntegerLayout) -> None:
    """Put `held` in the place of `module.weight`."""
    attach_coded(module, IntegerLinear, held, layout)
