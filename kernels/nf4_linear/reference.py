"""y = x·dq(W)ᵀ + b in plain torch: the truth that faster kernels are checked against."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lrcompile.kernels.nf4_dequant.reference import dequantize_nf4
from lrcompile.kernels.nf4_dequant.storage import Nf4, Tables


def nf4_linear(
    x: Tensor,
    nf4: Nf4,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
    block_size: int,
    transposed: bool,
    compute_dtype: torch.dtype,
    *,
    whole: bool = False,
    constants: Tables | None = None,
) -> Tensor:
    """y = x·dq(W)ᵀ + b, or x·dq(W) + b when W is stored transposed, `[in, out]`.

    x `[..., in]`, bias `[out]`; weight, product and sum in `compute_dtype`, y `[..., out]` contiguous in x's dtype.
    """
    shape = (in_features, out_features) if transposed else (out_features, in_features)
    weight = dequantize_nf4(nf4, shape, block_size, compute_dtype, whole=whole, constants=constants)
    rows = x.to(compute_dtype).reshape(math.prod(x.shape[:-1]), in_features)
    y = F.linear(rows, weight.t() if transposed else weight, None if bias is None else bias.to(compute_dtype))
    return y.view(*x.shape[:-1], out_features).to(x.dtype)
