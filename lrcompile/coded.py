"""A linear module whose weight is held as codes: what every way to store one has in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lrcompile.hosting import Host, stack, stacked

_LAYOUT = "_lrcompile_layout"


@dataclass(frozen=True)
class Layout:
    """What the codes do not say of their weight."""

    out_features: int
    in_features: int
    transposed: bool
    """The module's own weight was `[in, out]`."""
    block_size: int
    """Elements that share a scale."""
    dtype: torch.dtype
    """The dtype `.weight` answers in: its own before, and what a cast of the module made of that since."""


class CodedLinear(Host):
    """y = x·Wᵀ + b, W as codes and scales in the buffers `PARTS`, which only ever move between devices: a cast would
    destroy the scales.

    `.weight`, which a storage adds, decodes at each read, for parents that look at it; it is a computed value, so
    writing to it changes nothing.
    """

    PARTS: ClassVar[tuple[str, ...]]
    bias: Tensor | None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        buffers: dict[str, Tensor | None] = self._buffers  # type: ignore[attr-defined]
        held = {name: buffers.pop(name) for name in self.PARTS}
        try:
            super()._apply(fn, recurse)  # type: ignore[misc]
            moved = {name: None if tensor is None else _moved(tensor, fn) for name, tensor in held.items()}
            codes = held[self.PARTS[0]]
            assert codes is not None
            dtype = fn(torch.empty(0, dtype=coded_layout(self).dtype, device=codes.device)).dtype
        except BaseException:
            buffers.update(held)
            raise
        buffers.update(moved)
        self.__dict__[_LAYOUT] = replace(coded_layout(self), dtype=dtype)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        """Copying would cast: codes and scales of one form must not land in buffers of another."""
        errors: list[str] = rest[-1]
        for name in self.PARTS:
            here, there = self._buffers[name], state_dict.get(prefix + name)  # type: ignore[attr-defined]
            if here is not None and there is not None and here.dtype != there.dtype:
                errors.append(f"{prefix}{name} is {there.dtype}, expected {here.dtype} (stored in another form?)")
                return
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[misc]

    def form(self) -> str:
        """How the weight is stored, for people."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        layout = coded_layout(self)
        shape = f"in_features={layout.in_features}, out_features={layout.out_features}"
        return f"{shape}, bias={self.bias is not None}, {self.form()}"

    __repr__ = nn.Module.__repr__


def _moved(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """What `fn` makes of `tensor`, but for a change of dtype, which cannot be undone by casting back."""
    result = fn(tensor)
    return result if result.dtype == tensor.dtype else tensor.to(result.device)


def is_coded(module: nn.Module) -> bool:
    return isinstance(module, CodedLinear)


def coded_layout(module: nn.Module | CodedLinear) -> Any:
    return module.__dict__[_LAYOUT]


def attach_coded(module: nn.Module, storage: type[CodedLinear], parts: Sequence[Tensor | None], layout: Layout) -> None:
    """Put `parts` in the place of `module.weight`, beneath whatever else its class was swapped for."""
    del module._parameters["weight"]
    mixins, original = stack(type(module))
    module.__class__ = stacked([*mixins, storage], original)
    module.__dict__[_LAYOUT] = layout
    for name, tensor in zip(storage.PARTS, parts, strict=True):
        module.register_buffer(name, tensor)


def detach_coded(module: nn.Module, weight: nn.Parameter) -> None:
    """Undo `attach_coded`, `weight` being stored as the module's own was."""
    mixins, original = stack(type(module))
    storage = next(mixin for mixin in mixins if issubclass(mixin, CodedLinear))
    for name in storage.PARTS:
        del module._buffers[name]
    del module.__dict__[_LAYOUT]
    module.__class__ = stacked([mixin for mixin in mixins if mixin is not storage], original)
    module.weight = weight
