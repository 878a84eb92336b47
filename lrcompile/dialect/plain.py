"""When a dialect op may choose how it computes: only the numbers count, nobody sees which operations made them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor


def plain(*tensors: Tensor) -> bool:
    """Are these numbers in memory: no stand-ins of a capture, no shards, nothing inside a `torch.func` transform?"""
    return all(type(each) in (Tensor, nn.Parameter) and not is_functorch_wrapped_tensor(each) for each in tensors)


def unseen(*tensors: Tensor) -> bool:
    """Are they `plain`, and does nothing that is active look at the operations, so that a node of autograd with a
    backward of its own may stand for several?
    """
    return (
        plain(*tensors)
        and not torch.jit.is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch.autograd.forward_ad._current_level < 0
    )


def plus(y: Tensor, fresh: Tensor) -> Tensor:
    """y + fresh. Nobody else holds `fresh` and no backward needs it, so where it can the sum takes its place: one
    buffer as wide as y less, and no pass over new memory.
    """
    if plain(y, fresh) and fresh.dtype == y.dtype and fresh.shape == y.shape:
        return fresh.add_(y)
    return y + fresh
