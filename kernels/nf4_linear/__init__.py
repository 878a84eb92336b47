"""A linear map whose weight is stored as NF4 codes: `reference` is the definition of truth."""

from lrcompile.kernels.nf4_dequant import (
    ABSMAX_BLOCK,
    BLOCK_SIZES,
    CODEBOOK,
    DYNAMIC_CODEBOOK,
    Nf4,
    Tables,
    decode_absmax,
    dequantize_nf4,
    nf4_shapes,
    quantize_nf4,
    tables,
)
from lrcompile.kernels.nf4_linear.reference import nf4_linear

__all__ = [
    "ABSMAX_BLOCK",
    "BLOCK_SIZES",
    "CODEBOOK",
    "DYNAMIC_CODEBOOK",
    "Nf4",
    "Tables",
    "decode_absmax",
    "dequantize_nf4",
    "nf4_linear",
    "nf4_shapes",
    "quantize_nf4",
    "tables",
]
