"""When a dialect op may choose how it computes: only the numbers count, nobody sees which operations made them."""

from __future__ import annotations

from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor


def plain(*tensors: Tensor) -> bool:
    """Are these numbers in memory: no stand-ins of a capture, no shards, nothing inside a `torch.func` transform?"""
    return all(type(each) in (Tensor, nn.Parameter) and not is_functorch_wrapped_tensor(each) for each in tensors)


def plus(y: Tensor, fresh: Tensor) -> Tensor:
    """y + fresh. Nobody else holds `fresh` and no backward needs it, so where it can the sum takes its place: one
    buffer as wide as y less, and no pass over new memory.
    """
    if plain(y, fresh) and fresh.dtype == y.dtype and fresh.shape == y.shape:
        return fresh.add_(y)
    return y + fresh
