"""yᵢ = x·Wᵢᵀ + bᵢ + Sᵢ·Bᵢᵀ in float32: maps that share their input, each with the second half of its low-rank pair."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lrcompile.kernels.lora_linear.reference import lora_linear


def lora_group(
    x: Tensor, Ws: Sequence[Tensor], biases: Sequence[Tensor | None], Ss: Sequence[Tensor], Bs: Sequence[Tensor]
) -> list[Tensor]:
    """x `[rows, in]`, Wᵢ `[outᵢ, in]`, bᵢ `[outᵢ]`, Sᵢ `[rows, rankᵢ]`, Bᵢ `[outᵢ, rankᵢ]`; yᵢ `[rows, outᵢ]`."""
    each = zip(Ws, biases, Ss, Bs, strict=True)
    return [lora_linear(x, W, bias, S, B) for W, bias, S, B in each]
