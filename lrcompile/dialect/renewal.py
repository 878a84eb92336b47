"""The dialect's op for the step in which a projection is due: its backward pass finds P anew, then projects with it.

    y' = y,    ∂x = 0,    ∂y = ∂y',    ∂Z = G·P'ᵀ or P'ᵀ·G,    P' = the leading directions of G = ∂yᵀx

Finding P changes Python state, and how long it takes depends on data: nothing for a graph. So the backward is one
opaque op, which finds its site by number; the number is a tensor, so that a graph serves every site like the first.
"""

from __future__ import annotations

import itertools
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lrcompile.dialect import LIBRARY

LIBRARY.define("renew_projection(Tensor y, Tensor x, Tensor Z, Tensor site) -> Tensor")
LIBRARY.define(
    "renewed_gradient(Tensor dy, Tensor x, Tensor site, SymInt[] size, ScalarType dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


class Renews(Protocol):
    def gradient_anew(self, dy: Tensor, x: Tensor) -> Tensor:
        """∂Z, of P as it is found now."""


_sites: WeakValueDictionary[int, Renews] = WeakValueDictionary()
_numbers = itertools.count()


def enrol(site: Renews) -> Tensor:
    """The number of `site` from now on, 0-d on the CPU: no device has to be waited for to read it."""
    number = next(_numbers)
    _sites[number] = site
    return torch.tensor(number, device="cpu")


@torch.library.impl(LIBRARY, "renew_projection", "CompositeImplicitAutograd")
def renew_projection(y: Tensor, x: Tensor, Z: Tensor, site: Tensor) -> Tensor:
    """y itself; as `project_gradient`, but for the backward pass, which asks the site to renew its projection first.

    y `[..., out]`, x `[..., in]`, Z of any shape, site 0-d int64 (see `enrol`).
    """
    return _Renewal.apply(y, x, Z, site)


@torch.library.impl(LIBRARY, "renewed_gradient", "CompositeExplicitAutograd")
def _kernel(dy: Tensor, x: Tensor, site: Tensor, size: list[int], dtype: torch.dtype) -> Tensor:
    return _sites[int(site)].gradient_anew(dy, x).to(dtype).contiguous()


@torch.library.register_fake("lrcompile::renewed_gradient", lib=LIBRARY)
def _fake(dy: Tensor, x: Tensor, site: Tensor, size: list[int], dtype: torch.dtype) -> Tensor:
    return dy.new_empty(size, dtype=dtype)


class _Renewal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, Z: Tensor, site: Tensor) -> Tensor:
        ctx.save_for_backward(x, site)
        ctx.size, ctx.dtype = list(Z.shape), Z.dtype
        return y.detach()  # a view would refuse the in-place activation that may follow

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, site = ctx.saved_tensors
        return dy, None, torch.ops.lrcompile.renewed_gradient(dy, x, site, ctx.size, ctx.dtype), None
