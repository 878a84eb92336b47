"""Forms that need the map they act beside: its weight, its bias, its product."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrcompile.dialect.norm import product_of
from lrcompile.kernels.nf4_dequant import dequantize_nf4
from lrcompile.nf4.modules import codes_of, is_nf4, layout_of, nf4_weight
from lrcompile.recipes.forms.adapter import Adapter
from lrcompile.sites.site import Site
from lrcompile.specs import Spec


class Hosted(Adapter):
    """An adapter beside a linear layer, float or NF4, that reads the layer's own tensors."""

    reads_weight = True
    transposed = False
    """The layer holds W as `[in, out]`."""

    @classmethod
    def build(cls, spec: Spec, site: Site, shared: Any, *, dtype: torch.dtype, device: torch.device) -> Hosted:
        adapter = super().build(spec, site, shared, dtype=dtype, device=device)
        assert isinstance(adapter, Hosted)
        adapter.transposed = site.transposed
        return adapter

    def base_weight(self, host: nn.Module) -> Tensor:
        """W `[out, in]` as it is held; of an NF4 layer its values, in float32 or wider."""
        if is_nf4(host):
            if not torch.compiler.is_compiling():
                return nf4_weight(host, wide_dtype(host))
            layout = layout_of(host)  # all at once: a graph cannot hold the loop that writes it chunk by chunk
            W = dequantize_nf4(codes_of(host), layout.shape, layout.block_size, wide_dtype(host), whole=True)
            return W.t() if layout.transposed else W
        weight: Any = host.weight
        return weight.t() if self.transposed else weight

    def base_product(self, host: nn.Module, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """x·Wᵀ without the bias, as the layer forms it, or all of it in `dtype`."""
        if not is_nf4(host):
            W = self.base_weight(host)
            return F.linear(x, W) if dtype is None else product_of(x.to(dtype), W, dtype)
        layout = layout_of(host)
        return torch.ops.lrcompile.nf4_linear.default(
            x if dtype is None else x.to(dtype), *codes_of(host), None, layout.out_features, layout.in_features,
            layout.block_size, layout.transposed, dtype or layout.compute_dtype or layout.dtype,
        )  # fmt: skip


def wide_dtype(host: nn.Module) -> torch.dtype:
    """What sums over W are formed in: float32, or float64 for a float64 layer."""
    held: Any = layout_of(host) if is_nf4(host) else host.weight
    return torch.promote_types(held.dtype, torch.float32)


def base_bias(host: nn.Module) -> Tensor | None:
    bias: Any = host.bias
    return bias


def base_tensors(host: nn.Module) -> tuple[Tensor, ...]:
    """The tensors that W is held in."""
    if is_nf4(host):
        return tuple(tensor for tensor in codes_of(host) if tensor is not None)
    weight: Any = host.weight
    return (weight,)
