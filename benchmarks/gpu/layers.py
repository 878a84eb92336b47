"""Decoder layers as Llama has them, with nothing but torch: rotary positions and caches left out, shapes as given."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Sizes:
    hidden: int
    keys: int
    inner: int
    head: int = 128


LLAMA_8B = Sizes(4096, 1024, 14336)
SMALL = Sizes(256, 64, 688, head=32)
TINY = Sizes(32, 16, 40, head=8)


class Layer(nn.Module):
    def __init__(self, sizes: Sizes):
        super().__init__()
        self.head = sizes.head
        linear = lambda i, o: nn.Linear(i, o, bias=False)  # noqa: E731
        self.q_proj, self.o_proj = linear(sizes.hidden, sizes.hidden), linear(sizes.hidden, sizes.hidden)
        self.k_proj, self.v_proj = linear(sizes.hidden, sizes.keys), linear(sizes.hidden, sizes.keys)
        self.gate_proj, self.up_proj = linear(sizes.hidden, sizes.inner), linear(sizes.hidden, sizes.inner)
        self.down_proj = linear(sizes.inner, sizes.hidden)
        self.first, self.second = nn.RMSNorm(sizes.hidden), nn.RMSNorm(sizes.hidden)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        q, k, v = (self._heads(proj(h)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o_proj(attended.transpose(1, 2).flatten(2))
        h = self.second(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))

    def _heads(self, y: Tensor) -> Tensor:
        return y.unflatten(-1, (-1, self.head)).transpose(1, 2)


class Layers(nn.Module):
    """`count` of them; the loss is a given combination of the outputs, so that gradients are as random as it is."""

    def __init__(self, sizes: Sizes, count: int):
        super().__init__()
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(count))

    def forward(self, x: Tensor, weight: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            x = layer(x)
        return {"loss": (x * weight).sum() / x[..., 0].numel()}


def batch(sizes: Sizes, rows: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(1, rows, sizes.hidden, generator=generator) for _ in range(2)]
    x, weight = (each.to(device, dtype) for each in made)
    return {"x": x.requires_grad_(), "weight": weight}
