"""Dropout before a frozen map: the backward pass draws the mask again, so that nothing as wide as x is kept."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._guards import detect_fake_mode

from lrcompile.kernels.dropout import mask


def dropped(x: Tensor, p: float, A: Tensor) -> Tensor:
    """drop(x), of which A takes the product: zero with probability p, x/(1 − p) otherwise.

    With a frozen parameter A only the gradient of x needs the mask, and a seed stands for it, drawn from torch's CPU
    generator, which `torch.manual_seed` and checkpointing rule over. A trained A has drop(x) kept anyway. Whether a
    gradient is wanted now does not matter, since a checkpoint asks for none at first and draws again later. Graphs
    under capture have plain dropout, since a seed were a constant there; `replay-dropout` gives them one of their own.
    """
    frozen = isinstance(A, nn.Parameter) and not A.requires_grad
    if not frozen or detect_fake_mode([x]) is not None:
        return F.dropout(x, p, True)
    return _Replayed.apply(x, p, int(torch.randint(2**62, ())))


class _Replayed(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, p: float, seed: int) -> Tensor:
        return x * mask(x, p, seed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float, int], output: Tensor) -> None:
        _, ctx.p, ctx.seed = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * mask(grad, ctx.p, ctx.seed), None, None
