"""What an adapter costs at one site: its own operations, run on the meta device, where tensors have no values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lrcompile.recipes import recipe
from lrcompile.recipes.recipe import part
from lrcompile.sites.site import Site
from lrcompile.specs import Spec

META = torch.device("meta")


@dataclass(frozen=True)
class Cost:
    """Of one training step: FLOPs of the adapter's products, and bytes it keeps for the backward pass."""

    flops: int
    saved_bytes: int


def cost(spec: Spec, site: Site, tokens: int, dtype: torch.dtype) -> Cost:
    """The adapter `spec` means at `site`, forward and backward on `tokens` rows of `dtype`, the base left out.

    A stack of maps is taken for one of them. What is saved counts x too, which other sites with the same input share.
    """
    site = replace(site, copies=None)
    method = recipe(spec.method)
    assert method.form is not None  # a method without one hits no site
    form = part(method.form)
    own = getattr(torch, spec.dtype) if spec.dtype else torch.promote_types(dtype, torch.float32)
    adapter = form.build(spec, site, form.share(spec, [site], dtype=own, device=META), dtype=own, device=META)
    for name, parameter in adapter.named_parameters():
        parameter.requires_grad_(name in method.trains)
    host = nn.Linear(site.in_features, site.out_features, dtype=dtype, device=META).requires_grad_(False)
    y, x = (torch.empty(tokens, width, dtype=dtype, device=META, requires_grad=True)
            for width in (site.out_features, site.in_features))  # fmt: skip
    kept = _Kept([*adapter.parameters(), *adapter.buffers(), *host.parameters()])
    with FlopCounterMode(display=False) as counter, torch.random.fork_rng(devices=[]):
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
            if site.form == "lookup":
                out = adapter.train().lookup(y, torch.empty(tokens, dtype=torch.int64, device=META), None)
            else:
                out = adapter.train()(y, x, host)
        out.backward(torch.empty_like(out))
    return Cost(counter.get_total_flops(), kept.bytes)


class _Kept:
    """Bytes of distinct storages packed, without those of `own`."""

    def __init__(self, own: Iterable[Tensor]):
        self.seen = {tensor.untyped_storage()._cdata for tensor in own}
        self.bytes = 0

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.bytes += storage.nbytes()
        return tensor
