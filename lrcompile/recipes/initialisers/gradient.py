"""Factors that start from the mean gradient G `[..., out, in]` of the loss at the weight."""

from __future__ import annotations

import torch
from torch import Tensor

from lrcompile.errors import SpecError
from lrcompile.recipes.forms.adapter import Start
from lrcompile.recipes.forms.core import CoreAdapter
from lrcompile.recipes.forms.pair import LoraAdapter
from lrcompile.recipes.singular import Triplets, leading


def lora_ga(adapter: LoraAdapter, start: Start) -> None:
    """A₀ = c·V_aᵀ, B₀ = c·U_b, c = out^¼/√γ, the columns a and b splitting the first 2r singular pairs of G.

    So A₀A₀ᵀ = B₀ᵀB₀ = c²·I and G·A₀ᵀA₀ + B₀B₀ᵀG = c²·G_{2r}, the best approximation of G of rank 2r: one step of
    gradient descent changes the weight by −η·s²·c²·G_{2r} + O(η²)  (arXiv 2407.05000). No singular value enters a
    factor; PEFT's variant, which has them in B, lacks that property. `direction` ArB2r: a = 1…r, b = r+1…2r; A2rBr: the
    other way round; ArBr: a even, b odd ones (counted from 1).

    Raises `SpecError` where G has not 2r singular pairs.
    """
    G, rank = _gradient(adapter, start), adapter.rank
    found = _leading(G, 2 * rank, adapter, start)
    first, second = slice(0, rank), slice(rank, 2 * rank)
    odd, even = slice(0, None, 2), slice(1, None, 2)
    a, b = {"ArB2r": (first, second), "A2rBr": (second, first), "ArBr": (even, odd)}[start.spec.direction]
    c = adapter.out_features**0.25 / start.spec.gamma**0.5
    adapter.A.copy_(c * found.Vh[..., a, :])
    adapter.B.copy_(c * found.U[..., b])


def lora_one(adapter: LoraAdapter, start: Start) -> None:
    """B·A = −G_r/(γ·σ₁), G_r = UΣVᵀ the best approximation of G of rank r: A = (Σ/σ₁)^½·Vᵀ/√γ, B = −U·(Σ/σ₁)^½/√γ.

    The model starts one step of gradient descent ahead, so its output at the start is *not* the base's: the update has
    spectral norm s/γ  (arXiv 2502.01235). A map of a stack without any gradient (an expert no token was routed to)
    starts as plain LoRA.
    """
    G = _gradient(adapter, start)
    found = _leading(G, adapter.rank, adapter, start)
    largest = found.S[..., :1]
    there = largest > 0
    root = (found.S / torch.where(there, largest, 1)).sqrt() / start.spec.gamma**0.5
    there = there[..., None]
    adapter.A.copy_(torch.where(there, root[..., :, None] * found.Vh, adapter.A))
    adapter.B.copy_(torch.where(there, -found.U * root[..., None, :], adapter.B))


def lora_sb(adapter: CoreAdapter, start: Start) -> None:
    """B·M·A = (−η·sign(G))_r, the best approximation of rank r of AdamW's first step: B = U_r, M = Σ_r, A = V_rᵀ.

    η is `first_lr`. A and B are orthonormal and stay; the model's output at the start is *not* the base's but one step
    ahead  (arXiv 2411.19557).
    """
    step = -start.spec.first_lr * _gradient(adapter, start).sign()
    found = _leading(step, adapter.rank, adapter, start)
    adapter.A.copy_(found.Vh)
    adapter.M.copy_(torch.diag_embed(found.S))
    adapter.B.copy_(found.U)


Factors = LoraAdapter | CoreAdapter


def _gradient(adapter: Factors, start: Start) -> Tensor:
    return start.measured.to(adapter.A.device)


def _leading(matrix: Tensor, count: int, adapter: Factors, start: Start) -> Triplets:
    there, each = min(matrix.shape[-2:]), count // adapter.rank
    if count > there:
        raise SpecError(
            f"{start.spec.method} takes {count} singular pairs of the gradient at {start.site.name!r}, which has only"
            f" {there}: a rank of {there // each} is the most there; lower rank or rank_pattern, or exclude the site",
            field="rank",
        )
    width = min(4 * adapter.rank, there)
    return leading(matrix, count, width=width, generator=start.generator)
