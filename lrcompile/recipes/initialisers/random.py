"""Random factors. Each fills A `[..., rank, in]` and B `[..., out, rank]` in place; the product B·A is zero but
where said.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable

import torch
from torch import Tensor

Initialiser = Callable[[Tensor, Tensor, "torch.Generator | None"], None]


def kaiming(A: Tensor, B: Tensor, generator: torch.Generator | None) -> None:
    """A ~ U(−1/√in, 1/√in), B = 0: what the original code does (kaiming_uniform with a = √5)."""
    bound = 1 / math.sqrt(A.shape[-1])
    A.uniform_(-bound, bound, generator=generator)
    B.zero_()


def gaussian(A: Tensor, B: Tensor, generator: torch.Generator | None) -> None:
    """A ~ N(0, 1/rank²), B = 0."""
    A.normal_(0, 1 / A.shape[-2], generator=generator)
    B.zero_()


def orthogonal(A: Tensor, B: Tensor, generator: torch.Generator | None) -> None:
    """Even and odd rows of one orthogonal `[rank, rank]` matrix Q span A and B, so that B·A = 0 with neither zero
    (even ranks).

    A = Q[0::2]ᵀ X / 10 and B = (Q[1::2]ᵀ Z)ᵀ / 10 with standard normal X `[rank/2, in]`, Z `[rank/2, out]`.
    """
    rank = A.shape[-2]
    lead = A.shape[:-2]
    draw = lambda *shape: torch.randn(*shape, generator=generator, device=A.device)  # noqa: E731
    Q, _ = torch.linalg.qr(draw(*lead, rank, rank))
    A.copy_(Q[..., 0::2, :].mT @ draw(*lead, (rank + 1) // 2, A.shape[-1]) / 10)
    B.copy_((Q[..., 1::2, :].mT @ draw(*lead, rank // 2, B.shape[-2])).mT / 10)


def lookup(A: Tensor, B: Tensor, generator: torch.Generator | None) -> None:
    """A = 0, B ~ N(0, 1): for weights read by row, where A's columns are the rows."""
    A.zero_()
    B.normal_(0, 1, generator=generator)


_BY_NAME: dict[str, Initialiser] = {
    "kaiming": kaiming,
    "gaussian": gaussian,
    "orthogonal": orthogonal,
    "lookup": lookup,
}


def fill(name: str, A: Tensor, B: Tensor, generator: torch.Generator | None = None) -> None:
    """Fill the factors of one site as the initialiser `name` does."""
    with torch.no_grad():
        _BY_NAME[name](A, B, generator)


def generator_of(seed: int | None, site: str, device: torch.device) -> torch.Generator | None:
    """With a `seed` the values depend on it and the site's name only; None: torch's own generator."""
    return None if seed is None else torch.Generator(device).manual_seed(seed ^ zlib.crc32(site.encode()))
