"""A linear module whose weight is NF4: the class its own is swapped for, what that keeps for the parameter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import lrcompile.coded as coded
import lrcompile.dialect.nf4  # noqa: F401  (registers the op)
from lrcompile.coded import CodedLinear, attach_coded, coded_layout, detach_coded
from lrcompile.kernels.nf4_dequant import Nf4, dequantize_nf4


@dataclass(frozen=True)
class Layout(coded.Layout):
    """The codes are of the weight as it was stored, transposed or not."""

    compute_dtype: torch.dtype | None
    """None: `dtype`."""

    @property
    def shape(self) -> tuple[int, int]:
        return (self.in_features, self.out_features) if self.transposed else (self.out_features, self.in_features)


class Nf4Linear(CodedLinear):
    """W = dq(codes), the product formed in the layout's compute dtype."""

    PARTS = tuple(f"weight_{field}" for field in Nf4._fields)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        (x,) = args or kwargs.values()
        layout, nf4 = layout_of(self), codes_of(self)
        return torch.ops.lrcompile.nf4_linear(
            x, *nf4, self.bias, layout.out_features, layout.in_features, layout.block_size, layout.transposed,
            layout.compute_dtype or layout.dtype,
        )  # fmt: skip

    @property
    def weight(self) -> Tensor:
        layout = layout_of(self)
        return dequantize_nf4(codes_of(self), layout.shape, layout.block_size, layout.dtype)

    def form(self) -> str:
        layout, double = layout_of(self), codes_of(self).absmax_scale is not None
        compute = "" if layout.compute_dtype is None else f", compute_dtype={layout.compute_dtype}"
        return f"nf4(block_size={layout.block_size}, double_quant={double}{compute})"


def is_nf4(module: nn.Module) -> bool:
    return isinstance(module, Nf4Linear)


def layout_of(module: nn.Module | Nf4Linear) -> Layout:
    return coded_layout(module)


def codes_of(module: nn.Module | Nf4Linear) -> Nf4:
    return Nf4(*(getattr(module, name) for name in Nf4Linear.PARTS))


def nf4_weight(module: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """dq(W) as `[out, in]` in `dtype`; true float64 when that is asked for."""
    layout = layout_of(module)
    weight = dequantize_nf4(codes_of(module), layout.shape, layout.block_size, dtype)
    return weight.t() if layout.transposed else weight


def replace_codes(module: nn.Module, nf4: Nf4) -> None:
    """Other codes for the same layout, stored in the same form."""
    for name, tensor in zip(Nf4Linear.PARTS, nf4, strict=True):
        held: Tensor | None = module._buffers[name]
        assert (held is None) == (tensor is None)
        module._buffers[name] = tensor if held is None or tensor is None else tensor.to(held.device)


def attach(module: nn.Module, nf4: Nf4, layout: Layout) -> None:
    """Put `nf4` in the place of `module.weight`."""
    attach_coded(module, Nf4Linear, nf4, layout)


def detach(module: nn.Module, weight: nn.Parameter) -> tuple[Nf4, Layout]:
    """Undo `attach`, `weight` being stored as `layout.shape` says; returns what `attach` takes."""
    held = codes_of(module), layout_of(module)
    detach_coded(module, weight)
    return held
