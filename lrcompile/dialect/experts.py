"""The dialect's op for a stack of maps of which each row uses one: the routed experts of a mixture."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lrcompile.dialect import LIBRARY
from lrcompile.dialect.dropped import dropped
from lrcompile.dialect.plain import plus

LIBRARY.define(
    "lora_experts(Tensor y, Tensor x, Tensor A, Tensor B, Tensor scale, Tensor experts, float dropout=0.0) -> Tensor"
)


@torch.library.impl(LIBRARY, "lora_experts", "CompositeImplicitAutograd")
def lora_experts(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: Tensor, experts: Tensor, dropout: float = 0.0
) -> Tensor:
    """y + s·B̂·C·Â·drop(x): all factors side by side, C the 0/1 diagonal that keeps each row's own expert.

    y `[..., out]`, x `[..., in]`, A `[experts, rank, in]`, B `[experts, out, rank]`, experts integer `[...]`; a row
    whose index is no expert keeps its y. This form gathers no factors and depends on no data, so it exports with any
    number of rows; it costs rows·experts·rank·(in + out), where a grouped product would save the factor `experts`.
    """
    if dropout:
        x = dropped(x, dropout, A)
    count, rank, _ = A.shape
    code = F.linear(x.to(y.dtype), A.flatten(0, 1).to(y.dtype)).unflatten(-1, (count, rank))
    others = experts.unsqueeze(-1) != torch.arange(count, device=experts.device)
    code = code.masked_fill(others.unsqueeze(-1), 0.0) * scale.to(y.dtype)
    return plus(y, F.linear(code.flatten(-2), B.movedim(0, 1).flatten(1).to(y.dtype)))
