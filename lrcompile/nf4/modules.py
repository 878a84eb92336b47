"""A linear module whose weight is NF4: the class its own is swapped for, what that keeps for the parameter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import lrcompile.dialect.nf4  # noqa: F401  (registers the op)
from lrcompile.hosting import Host, stack, stacked
from lrcompile.kernels.nf4_dequant import Nf4, dequantize_nf4

BUFFERS = tuple(f"weight_{field}" for field in Nf4._fields)
_LAYOUT = "_lrcompile_nf4"


@dataclass(frozen=True)
class Layout:
    """What the codes do not say of their weight."""

    out_features: int
    in_features: int
    transposed: bool
    """Stored as `[in, out]`."""
    block_size: int
    dtype: torch.dtype
    """The dtype the weight answers in: its own before, and what a cast of the module made of that since."""
    compute_dtype: torch.dtype | None
    """None: `dtype`."""

    @property
    def shape(self) -> tuple[int, int]:
        return (self.in_features, self.out_features) if self.transposed else (self.out_features, self.in_features)


class Nf4Linear(Host):
    """y = x·dq(W)ᵀ + b, W as codes in buffers that only ever move between devices: a cast would destroy the block
    maxima.

    `.weight` dequantizes at each read, for parents that look at it; it is a computed value, so writing to it changes
    nothing.
    """

    bias: Tensor | None

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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        buffers: dict[str, Tensor | None] = self._buffers  # type: ignore[attr-defined]
        held = {name: buffers.pop(name) for name in BUFFERS}
        try:
            super()._apply(fn, recurse)  # type: ignore[misc]
            moved = {name: tensor if tensor is None else _moved(tensor, fn) for name, tensor in held.items()}
            dtype = fn(torch.empty(0, dtype=layout_of(self).dtype, device=held[BUFFERS[0]].device)).dtype  # type: ignore[union-attr]
        except BaseException:
            buffers.update(held)
            raise
        buffers.update(moved)
        self.__dict__[_LAYOUT] = replace(layout_of(self), dtype=dtype)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        """Copying would cast: maxima of one storage form must not land in buffers of the other."""
        errors: list[str] = rest[-1]
        for name in BUFFERS:
            here, there = self._buffers[name], state_dict.get(prefix + name)  # type: ignore[attr-defined]
            if here is not None and there is not None and here.dtype != there.dtype:
                errors.append(f"{prefix}{name} is {there.dtype}, expected {here.dtype} (double_quant differs?)")
                return
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[misc]

    def extra_repr(self) -> str:
        layout = layout_of(self)
        compute = "" if layout.compute_dtype is None else f", compute_dtype={layout.compute_dtype}"
        return (
            f"in_features={layout.in_features}, out_features={layout.out_features}, bias={self.bias is not None}, "
            f"nf4(block_size={layout.block_size}, double_quant={self._buffers[BUFFERS[2]] is not None}{compute})"  # type: ignore[attr-defined]
        )

    __repr__ = nn.Module.__repr__


def _moved(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """What `fn` makes of `tensor`, but for a change of dtype, which cannot be undone by casting back."""
    result = fn(tensor)
    return result if result.dtype == tensor.dtype else tensor.to(result.device)


def is_nf4(module: nn.Module) -> bool:
    return isinstance(module, Nf4Linear)


def layout_of(module: nn.Module | Nf4Linear) -> Layout:
    return module.__dict__[_LAYOUT]


def codes_of(module: nn.Module | Nf4Linear) -> Nf4:
    return Nf4(*(getattr(module, name) for name in BUFFERS))


def nf4_weight(module: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """dq(W) as `[out, in]` in `dtype`; true float64 when that is asked for."""
    layout = layout_of(module)
    weight = dequantize_nf4(codes_of(module), layout.shape, layout.block_size, dtype)
    return weight.t() if layout.transposed else weight


def replace_codes(module: nn.Module, nf4: Nf4) -> None:
    """Other codes for the same layout, stored in the same form."""
    for name, tensor in zip(BUFFERS, nf4, strict=True):
        held: Tensor | None = module._buffers[name]
        assert (held is None) == (tensor is None)
        module._buffers[name] = tensor if held is None or tensor is None else tensor.to(held.device)


def attach(module: nn.Module, nf4: Nf4, layout: Layout) -> None:
    """Put `nf4` in the place of `module.weight`, beneath whatever else its class was swapped for."""
    del module._parameters["weight"]
    mixins, original = stack(type(module))
    module.__class__ = stacked([*mixins, Nf4Linear], original)
    module.__dict__[_LAYOUT] = layout
    for name, tensor in zip(BUFFERS, nf4, strict=True):
        module.register_buffer(name, tensor)


def detach(module: nn.Module, weight: nn.Parameter) -> tuple[Nf4, Layout]:
    """Undo `attach`, `weight` being stored as `layout.shape` says; returns what `attach` takes."""
    nf4, layout = codes_of(module), module.__dict__.pop(_LAYOUT)
    mixins, original = stack(type(module))
    for name in BUFFERS:
        del module._buffers[name]
    module.__class__ = stacked([mixin for mixin in mixins if mixin is not Nf4Linear], original)
    module.weight = weight
    return nf4, layout
