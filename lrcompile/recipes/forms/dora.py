"""DoRA: a low-rank pair gives every output row of the weight a new direction, a vector gives it its size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrcompile.cached import Cached
from lrcompile.dialect import gain as gain  # registers torch.ops.lrcompile.gain
from lrcompile.dialect.norm import norms, product_of, squared_rows, without_autocast
from lrcompile.nf4.modules import codes_of, is_nf4, layout_of
from lrcompile.recipes.forms.adapter import Start
from lrcompile.recipes.forms.hosted import Hosted, base_bias, base_tensors, wide_dtype
from lrcompile.recipes.forms.pair import LoraAdapter


class DoraAdapter(Hosted, LoraAdapter):
    """y' = b + (m/n) ⊙ x(W + s·BA)ᵀ,  n_i = ‖(W + s·BA)_i‖  (arXiv 2402.09353).

    A `[rank, in]`, B `[out, rank]` and m `[out]` train; m starts as n, so the map starts as the layer's, to the bit
    (with adapter tensors of 16 bits, but for the rounding of m). n is a constant to autograd, as the paper proposes:
    ∂(W + s·BA) = (m/n) ⊙ G, ∂m = ⟨G_i, (W + s·BA)_i⟩/n_i. The bias is never scaled.

    Emitted as `lora` and then `gain`, y' = ŷ + (g − 1) ⊙ (ŷ − b). With active dropout, as in the official code, the
    dropped input x̃ takes the place of x in everything that m/n changes: y' = xWᵀ + b + (g − 1) ⊙ x̃Wᵀ + g ⊙ s·x̃AᵀBᵀ,
    one product with W more.

    The weight of `activate` scales the pair alone, not m.
    """

    uses = frozenset({"product"})
    m: Tensor

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._squares, self._norms = Cached(), Cached()

    @classmethod
    def shapes(cls, in_features: int, out_features: int, rank: int) -> Mapping[str, tuple[int, ...]]:
        return {**super().shapes(in_features, out_features, rank), "m": (out_features,)}

    def finish(self, start: Start) -> None:
        self.m.copy_(self._norms_of_map(start.weight()))

    def forward(self, y: Tensor, x: Tensor, host: nn.Module | None = None) -> Tensor:
        assert host is not None  # linear layers hand themselves over
        g, kept, p = self.gain(host), base_bias(host), self.probability
        if p:
            dropped = F.dropout(x, p, True)
            less = self.base_product(host, x - dropped)
            x, kept = dropped, less if kept is None else less + kept.to(less.dtype)
        y = torch.ops.lrcompile.lora.default(y, x, *self.operands(), self.scale, 0.0)
        return torch.ops.lrcompile.gain.default(y, g, kept)

    def gain(self, host: nn.Module) -> Tensor:
        """m/n `[out]` in float32 (float64 on a float64 layer), differentiable in m alone.

        n is computed once for every state of W, A, B and the scale, ‖W_i‖ once for every state of W. In a graph that
        is being compiled or captured n is one node; the pass `hoist-constants` takes it out.
        """
        n = self._norms_as_node(host) if torch.compiler.is_compiling() else self._norms_kept(host)
        return self.m.to(n.dtype) / n

    def _norms_kept(self, host: nn.Module) -> Tensor:
        held = base_tensors(host)

        def compute() -> Tensor:
            return self._norms_now(host, self._squares.get(held, lambda: self._squares_now(host)))

        return self._norms.get((*held, self.A, self.B, self.scale), compute)

    def _norms_as_node(self, host: nn.Module) -> Tensor:
        pair = (self.A, self.B, self.scale)
        if not is_nf4(host):
            return torch.ops.lrcompile.dora_norm.default(host.weight, *pair, self.transposed)
        layout = layout_of(host)
        return torch.ops.lrcompile.nf4_dora_norm.default(
            *codes_of(host), *pair, layout.out_features, layout.in_features, layout.block_size, layout.transposed,
            wide_dtype(host),
        )  # fmt: skip

    def change(self, weight: Tensor, base: Tensor) -> Tensor:
        with torch.no_grad():
            g = (self.m.to(base) / self._norms_of_map(base))[:, None].to(weight)
            return (g - 1) * weight + g * self.delta(weight.dtype).to(weight.device)

    def bias_change(self, bias: Tensor, base: Tensor, weight: Tensor) -> Tensor | None:
        """The bias stays; what an adapter before this one added to it is scaled like every output."""
        if torch.equal(bias, base):
            return None
        with torch.no_grad():
            return (self.m.to(weight) / self._norms_of_map(weight) - 1).to(bias) * (bias - base)

    def swappable(self, host: nn.Module) -> Mapping[str, Tensor]:
        with torch.no_grad():
            return {**self.turned(*self.factors()), "row_gain": self.gain(host)}

    def _squares_now(self, host: nn.Module) -> Tensor:
        return squared_rows(self.base_weight(host).detach(), wide_dtype(host))

    def _norms_now(self, host: nn.Module, squares: Tensor) -> Tensor:
        pair = (self.A.detach(), self.B.detach(), self.scale)
        with without_autocast(squares.device):
            if not is_nf4(host):
                return torch.ops.lrcompile_kernels.dora_norm(self.base_weight(host).detach(), *pair, squares)
            layout = layout_of(host)
            return torch.ops.lrcompile_kernels.nf4_dora_norm(
                *codes_of(host), *pair, squares, layout.block_size, layout.transposed, squares.dtype
            )

    def _norms_of_map(self, W: Tensor) -> Tensor:
        return norms(squared_rows(W, W.dtype), product_of(self.A.detach(), W, W.dtype), self.A, self.B, self.scale)
