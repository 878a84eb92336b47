"""NF4 weights: how they are stored, how they are made, and `reference`, the definition of what they mean."""

from lrcompile.kernels.nf4_dequant.quantize import quantize_nf4
from lrcompile.kernels.nf4_dequant.reference import decode_absmax, dequantize_nf4
from lrcompile.kernels.nf4_dequant.storage import (
    ABSMAX_BLOCK,
    BLOCK_SIZES,
    CODEBOOK,
    DYNAMIC_CODEBOOK,
    Nf4,
    Tables,
    nf4_shapes,
    pack,
    tables,
    unpack,
)

__all__ = [
    "ABSMAX_BLOCK",
    "BLOCK_SIZES",
    "CODEBOOK",
    "DYNAMIC_CODEBOOK",
    "Nf4",
    "Tables",
    "decode_absmax",
    "dequantize_nf4",
    "nf4_shapes",
    "pack",
    "quantize_nf4",
    "tables",
    "unpack",
]
