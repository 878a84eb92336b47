"""The dialect `torch.ops.lrcompile`: what adapters emit, passes match and lowerings replace.

Each composite op is registered `CompositeImplicitAutograd` with its plain reference as body: eager mode runs and
differentiates it as ordinary aten, Dynamo and `torch.export` keep it as one node, AOTAutograd decomposes it for any
backend. A dialect op never gets a backend kernel (that would silently remove its autograd); lowerings replace it by
`lrcompile_kernels::*` instead. The one opaque op, `nf4_linear`, lives in `lrcompile.dialect.nf4`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lrcompile.dialect.dropped import dropped
from lrcompile.dialect.plain import plus

LIBRARY = torch.library.Library("lrcompile", "FRAGMENT")

LIBRARY.define("lora(Tensor y, Tensor x, Tensor A, Tensor B, Tensor scale, float dropout=0.0) -> Tensor")
LIBRARY.define("lora_embedding(Tensor y, Tensor ids, Tensor A, Tensor B, Tensor scale, int padding_idx=-1) -> Tensor")


@torch.library.impl(LIBRARY, "lora", "CompositeImplicitAutograd")
def lora(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: Tensor, dropout: float = 0.0) -> Tensor:
    """y + s·(drop(x)Aᵀ)Bᵀ  (arXiv 2106.09685).

    y `[..., out]`, x `[..., in]`, A `[rank, in]`, B `[out, rank]`, scale 0-d; a stack of maps has A `[copies, rank,
    in]`, B `[copies, out, rank]` and applies them to x `[copies, ..., in]` as `torch.matmul` does. The product is
    formed in y's dtype, so float32 master factors beside a bfloat16 base cost two small casts and none of the
    activations' size. `dropout` is the probability in force (0 in evaluation).
    """
    if dropout:
        x = dropped(x, dropout, A)
    product = F.linear if A.dim() == 2 else _stacked
    code = product(x.to(y.dtype), A.to(y.dtype)) * scale.to(y.dtype)
    return plus(y, product(code, B.to(y.dtype)))


def _stacked(x: Tensor, W: Tensor) -> Tensor:
    return x @ W.mT


@torch.library.impl(LIBRARY, "lora_embedding", "CompositeImplicitAutograd")
def lora_embedding(y: Tensor, ids: Tensor, A: Tensor, B: Tensor, scale: Tensor, padding_idx: int = -1) -> Tensor:
    """y + s·(Aᵀ)[ids]·Bᵀ: the same pair read by row, in = the vocabulary.

    y `[..., dim]`, ids integer `[...]`, A `[rank, vocabulary]`, B `[dim, rank]`; rows of `padding_idx` (-1: none) get
    no gradient.
    """
    code = F.embedding(ids, A.t(), None if padding_idx < 0 else padding_idx).to(y.dtype) * scale.to(y.dtype)
    return plus(y, F.linear(code, B.to(y.dtype)))
