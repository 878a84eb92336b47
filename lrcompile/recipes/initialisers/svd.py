"""Factors from the singular triplets of the weight, W = U·diag(S)·Vᵀ with S falling.

PiSSA, MiLoRA:  A = (S/s)^½·Vᵀ, B = U·(S/s)^½, so that s·B·A is that part of W for any scale s
LoRA-XS:        A = S·Vᵀ, B = U, frozen
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lrcompile.errors import SpecError, TargetError
from lrcompile.recipes.forms.adapter import Start

CORE_DEVIATION = 1e-5
"""Standard deviation of LoRA-XS's M at the start, in the authors' code."""

Triplets = tuple[Tensor, Tensor, Tensor]


def pissa(adapter: Any, start: Start) -> None:
    """The largest r triplets  (arXiv 2404.02948). `niter` None: an exact SVD, else that many power iterations."""
    split(adapter, *largest(weight_of(adapter, start), adapter.rank, start.spec.niter, start.generator))


def milora(adapter: Any, start: Start) -> None:
    """The smallest r triplets  (arXiv 2406.09044); only an exact SVD finds them, which takes its time."""
    U, S, Vh = torch.linalg.svd(weight_of(adapter, start), full_matrices=False)
    first = S.shape[-1] - adapter.rank
    split(adapter, U[..., first:], S[..., first:], Vh[..., first:, :])


def lora_xs(adapter: Any, start: Start) -> None:
    """A = S·Vᵀ and B = U of the largest r triplets, M ~ N(0, 1e-5²)  (arXiv 2405.17604).

    S stands on the side of the input, as in the authors' code, whose U and V are those of Wᵀ.
    """
    U, S, Vh = largest(weight_of(adapter, start), adapter.rank, start.spec.niter, start.generator)
    adapter.A.copy_(S[..., None] * Vh)
    adapter.B.copy_(U)
    adapter.M.normal_(0, CORE_DEVIATION, generator=start.generator)


def weight_of(adapter: Any, start: Start) -> Tensor:
    """The weight, from which `adapter.rank` parts can be taken: a `rank_pattern` can ask for more than there are."""
    weight, site = start.weight(), start.site
    most = min(site.in_features, site.out_features)
    if adapter.rank > most:
        raise SpecError(
            f"{start.spec.method} starts from {adapter.rank} parts of the weight of {site.name!r}, which has {most};"
            " lower its rank_pattern, or exclude it",
            field="rank_pattern",
        )
    if not torch.isfinite(weight).all():
        raise TargetError(f"the weight of {site.name!r} holds NaN or infinite values; repair it, or exclude it")
    if not weight.any():
        raise TargetError(
            f"the weight of {site.name!r} is zero, so the factors that {start.spec.method} takes from it would be zero"
            " and never train; exclude it, or use a method that starts otherwise"
        )
    return weight


def largest(weight: Tensor, rank: int, niter: int | None, generator: torch.Generator | None) -> Triplets:
    """The largest triplets U `[..., out, r]`, S `[..., r]`, Vᵀ `[..., r, in]` of `weight` `[..., out, in]`.

    With `niter` by a randomized range finder without oversampling, as the authors and PEFT do it: the triplets are
    then orthogonal and fall, but miss a little of the energy. Whatever they miss stays in the weight.
    """
    if niter is None:
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        return U[..., :rank], S[..., :rank], Vh[..., :rank, :]
    with seeded(generator, weight.device):
        U, S, V = torch.svd_lowrank(weight, q=rank, niter=niter)
    return U, S, V.mT


def split(adapter: Any, U: Tensor, S: Tensor, Vh: Tensor) -> None:
    """A = (S/s)^½·Vᵀ and B = U·(S/s)^½, half of each singular value on either side."""
    root = (S / adapter.scale_value).sqrt()
    adapter.A.copy_(root[..., None] * Vh)
    adapter.B.copy_(U * root[..., None, :])


@contextmanager
def seeded(generator: torch.Generator | None, device: torch.device) -> Iterator[None]:
    """Within the block the default generator of `device` draws what `generator` decides, and none other is touched.
    `generator` None: it goes on where it is.
    """
    if generator is None:
        yield
        return
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    if device.type == "cpu":
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            yield
        return
    module = torch.get_device_module(device)
    with torch.random.fork_rng(devices=[device], device_type=device.type), module.device(device):
        module.manual_seed(seed)
        yield
