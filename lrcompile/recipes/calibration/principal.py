"""Principal directions of a stream of tokens, kept up to date batch by batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lrcompile.recipes.singular import leading


class Principal:
    """The leading `count` right singular vectors of the centred tokens seen so far, in memory of count·in.

    Each batch is joined with what is kept, Σ·Vᵀ, and one row for the shift of the mean; the SVD of that is what is kept
    next (Ross et al. 2008, as in the incremental PCA that EVA's code uses). Exact as long as the tokens have no more
    than `count` directions, or come in one batch; else what was cut off earlier is missing. The SVD of a large batch is
    a randomised one, as there.
    """

    def __init__(self, count: int):
        self.count = count
        self.batches = 0
        self.tokens = 0
        self.components = torch.empty(0)
        """`[≤ count, in]`, orthonormal rows, by falling singular value."""
        self._values = torch.empty(0)
        self._mean = torch.empty(0)
        self._total = torch.empty(0)
        self._cosines = torch.empty(0)

    def take(self, x: Tensor) -> None:
        """Take in tokens `[tokens, in]`."""
        new, mean = len(x), x.mean(0)
        centred = x - mean
        scatter = centred.square().sum()
        if not self.batches:
            stacked = centred
            self._mean, self._total = mean, scatter
        else:
            both = self.tokens + new
            shift = (self._mean - mean) * (self.tokens * new / both) ** 0.5
            stacked = torch.cat((self._values[:, None] * self.components, centred, shift[None]))
            self._mean = self._mean + (mean - self._mean) * (new / both)
            self._total = self._total + scatter + shift.square().sum()
        before = self.components
        _, self._values, self.components = leading(stacked, self.count, width=2 * self.count)
        if self.batches:
            common = min(len(before), len(self.components))
            self._cosines = F.cosine_similarity(before[:common], self.components[:common]).abs()
        self.batches += 1
        self.tokens += new

    def converged(self, count: int, tau: float) -> bool:
        """Did the first `count` directions keep theirs in the last batch, up to sign?"""
        return len(self._cosines) >= count and bool((self._cosines[:count] >= tau).all())

    def explained(self) -> Tensor:
        """The share of each direction in the variance of all tokens, on the host; without those that rounding made."""
        if not self.batches:
            return torch.empty(0)
        size = (self._total + self.tokens * self._mean.square().sum()).sqrt()  # ‖x‖ of all tokens, before centring
        eps = torch.finfo(self._values.dtype).eps
        noise = eps * torch.maximum(4 * size, max(self.components.shape) * self._values[0])
        return (self._values[self._values > noise].square() / self._total).cpu()
