"""The frozen weight below an adapter, by how it is held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lrcompile.kernels.nf4_dequant import ops as ops  # registers the leaf ops
from lrcompile.kernels.nf4_linear import ops as linear_ops  # noqa: F401

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
    by_codes: bool = False
    """Its products are formed from the codes by one kernel, for few rows; otherwise it is dequantized for them."""
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

    def product(self, held: Sequence[Tensor], x: Tensor, bias: Tensor | None) -> Tensor:
        """x·Wᵀ + b `[rows, out]` from the codes."""
        sizes = (self.out_features, self.in_features, self.block_size, self.transposed)
        return torch.ops.lrcompile_kernels.nf4_linear(x, *held, bias, *sizes, self.compute_dtype)

    def gradient(self, held: Sequence[Tensor], dy: Tensor) -> Tensor:
        """dy·W `[rows, in]` from the codes: the product with the features exchanged and the other storage order."""
        sizes = (self.in_features, self.out_features, self.block_size, not self.transposed)
        return torch.ops.lrcompile_kernels.nf4_linear(dy, *held, None, *sizes, self.compute_dtype)

    def computes_in(self, dtype: torch.dtype) -> torch.dtype:
        return self.compute_dtype


Base = Dense | Quantized
