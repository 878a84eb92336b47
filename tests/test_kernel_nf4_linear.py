"""y = x·dq(W)ᵀ + b: the definition."""

from __future__ import annotations

import pytest
import torch

from lrcompile.kernels.nf4_dequant import dequantize_nf4, quantize_nf4
from lrcompile.kernels.nf4_linear import nf4_linear


def _weight(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_linear_map_is_the_dequantized_weights(transposed):
    weight, x, bias = _weight((13, 7) if transposed else (7, 13)), _weight((2, 3, 13), seed=1), _weight(7, seed=2)
    nf4 = quantize_nf4(weight, 32, True)
    y = nf4_linear(x, nf4, bias, 7, 13, 32, transposed, torch.float64)
    dense = dequantize_nf4(nf4, weight.shape, 32, torch.float64)
    exact = x.double() @ (dense if transposed else dense.T) + bias.double()
    assert y.dtype == torch.float32
    assert torch.allclose(y.double(), exact, rtol=2**-23, atol=1e-12)
