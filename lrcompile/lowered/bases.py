"""The frozen weight below an adapter, by how it is held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lrcompile.kernels.nf4_dequant import ops as ops  # registers lrcompile_kernels::nf4_dequantize

FORWARD, BACKWARD = 0, 1


@dataclass(frozen=True)
class Dense:
    """W `[out, in]`, or `[in, out]` if `transposed`; held as one tensor."""

    transposed: bool = False
    size: ClassVar[int] = 1

    def matrix(self, held: Sequence[Tensor], dtype: torch.dtype, phase: int) -> Tensor:
        """Wᵀ `[in, out]` in `dtype`."""
        W = held[0].to(dtype)
        return W if self.transposed else W.t()

    def computes_in(self, dtype: torch.dtype) -> torch.dtype:
        """What the base product of an input of `dtype` is formed in."""
        return dtype


@dataclass(frozen=True)
class Quantized:
    """NF4: codes, absmax and the two tensors of a second quantization (None without)."""

    out_features: int
    in_features: int
    block_size: int
    transposed: bool
    compute_dtype: torch.dtype
    size: ClassVar[int] = 4

    def matrix(self, held: Sequence[Tensor], dtype: torch.dtype, phase: int) -> Tensor:
        """As `Dense.matrix`. Made anew in each pass, into memory that is free again after the product: the weight
        itself is never alive between forward and backward.
        """
        rows, columns = self.out_features, self.in_features
        if self.transposed:
            rows, columns = columns, rows
        W = torch.ops.lrcompile_kernels.nf4_dequantize(*held, rows, columns, self.block_size, dtype, phase)
        return W if self.transposed else W.t()

    def computes_in(self, dtype: torch.dtype) -> torch.dtype:
        return self.compute_dtype


Base = Dense | Quantized
