"""Adapters: the module that holds one site's added tensors and emits one dialect op, and the set of them a site
carries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lrcompile import dialect as dialect  # registers torch.ops.lrcompile
from lrcompile.dialect import experts as experts
from lrcompile.errors import AdapterError


class LoraAdapter(nn.Module):
    """Δ = s·B·A, applied as y + s·(drop(x)Aᵀ)Bᵀ  (arXiv 2106.09685).

    A `[rank, in]`, B `[out, rank]`; a stack of `copies` maps (experts, batched weights) carries a leading dimension on
    both. `scale` is a 0-d float32 buffer that no cast touches and no checkpoint holds: `scale_value · weight` is the
    truth and refills it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        scale: float,
        *,
        dropout: float = 0.0,
        copies: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        lead = () if copies is None else (copies,)
        self.rank, self.dropout = rank, dropout
        self.scale_value, self.weight = scale, 1.0
        self.A = nn.Parameter(torch.empty(*lead, rank, in_features, dtype=dtype, device=device))
        self.B = nn.Parameter(torch.empty(*lead, out_features, rank, dtype=dtype, device=device))
        self.register_buffer("scale", torch.empty((), dtype=torch.float32, device=device), persistent=False)
        self.refill_scale()

    scale: Tensor

    def refill_scale(self) -> None:
        """Write s·weight into the buffer, on the device the factors are on."""
        self.scale = torch.full((), self.scale_value * self.weight, dtype=torch.float32, device=self.A.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoraAdapter:
        super()._apply(fn, recurse)
        self.refill_scale()
        return self

    @property
    def probability(self) -> float:
        """The dropout probability in force now."""
        return self.dropout if self.training else 0.0

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return torch.ops.lrcompile.lora.default(y, x, self.A, self.B, self.scale, self.probability)

    def rows(self, y: Tensor, x: Tensor, start: int, stop: int) -> Tensor:
        """The part of the map that produces output rows start…stop, where one weight stacks several maps (q, k, v)."""
        return torch.ops.lrcompile.lora.default(y, x, self.A, self.B[start:stop], self.scale, self.probability)

    def experts(self, y: Tensor, x: Tensor, index: Tensor | int) -> Tensor:
        """The map of the stack that each row is routed to: `index` is one expert for all rows, or one for each."""
        if isinstance(index, int):
            return torch.ops.lrcompile.lora.default(y, x, self.A[index], self.B[index], self.scale, self.probability)
        return torch.ops.lrcompile.lora_experts.default(y, x, self.A, self.B, self.scale, index, self.probability)

    def lookup(self, y: Tensor, ids: Tensor, padding_idx: int | None) -> Tensor:
        """The map applied to one-hot rows given by index, as an embedding does."""
        pad = -1 if padding_idx is None else padding_idx
        return torch.ops.lrcompile.lora_embedding.default(y, ids, self.A, self.B, self.scale, pad)

    def delta(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """s·weight·B·A in `dtype`, `[..., out, in]`; with the float32 scale that the forward uses."""
        return (self.B.detach().to(dtype) @ self.A.detach().to(dtype)) * self.scale.to(dtype)

    def extra_repr(self) -> str:
        sizes = f"in={self.A.shape[-1]}, out={self.B.shape[-2]}, rank={self.rank}"
        return f"{sizes}, scale={self.scale_value:.6g}, dropout={self.dropout:g}"


class AdapterSet(nn.Module):
    """The adapters of one weight by name. `active` ones act now, in order; `merged` ones act through the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.active: tuple[str, ...] = ()
        self.merged: tuple[str, ...] = ()

    def attach(self, name: str, adapter: nn.Module) -> None:
        if name in self._modules:
            raise AdapterError(f"an adapter named {name!r} is here already")
        self._modules[name] = adapter

    def detach(self, name: str) -> None:
        del self._modules[name]
        self.active = tuple(other for other in self.active if other != name)

    def __getitem__(self, name: str) -> Any:
        return self._modules[name]

    def __contains__(self, name: str) -> bool:
        return name in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def live(self) -> list[Any]:
        """The adapters a forward applies, in order."""
        return [self._modules[name] for name in self.live_names()]

    def live_names(self) -> tuple[str, ...]:
        return tuple(name for name in self.active if name not in self.merged) if self.merged else self.active


RESERVED = frozenset(dir(AdapterSet()))
"""What an adapter cannot be called, because its tensors are reached by attribute."""


class AdapterSlots(nn.Module):
    """The adapter sets of one host by slot: an `nn.ModuleDict` without methods, as a parameter may be called `keys`."""

    def __setitem__(self, slot: str, adapters: AdapterSet) -> None:
        self._modules[slot] = adapters

    def __getitem__(self, slot: str) -> Any:
        return self._modules[slot]

    def __delitem__(self, slot: str) -> None:
        del self._modules[slot]

    def __contains__(self, slot: str) -> bool:
        return slot in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)
