"""The dialect's op for an update that is the weight itself times a low-rank product, element by element."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lrcompile.dialect import LIBRARY
from lrcompile.dialect.plain import plus

LIBRARY.define("hadamard(Tensor y, Tensor x, Tensor A, Tensor B, Tensor scale, Tensor W, float dropout=0.0) -> Tensor")


@torch.library.impl(LIBRARY, "hadamard", "CompositeImplicitAutograd")
def hadamard(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: Tensor, W: Tensor, dropout: float = 0.0) -> Tensor:
    """y + s·drop(x)(W ⊙ BA)ᵀ.

    y `[..., out]`, x `[..., in]`, A `[rank, in]`, B `[out, rank]`, scale 0-d, W `[out, in]`. Formed in y's dtype. The
    update has full rank: there is no cheaper way to apply it than as a matrix of W's size, which a backward pass keeps.
    """
    if dropout:
        x = F.dropout(x, dropout, True)
    update = W.to(y.dtype) * (B.to(y.dtype) @ A.to(y.dtype)) * scale.to(y.dtype)
    return plus(y, F.linear(x.to(y.dtype), update))
