"""A linear map whose weight is stored as NF4 codes: `reference` is the definition of truth."""

from lrcompile.kernels.nf4_linear.reference import nf4_linear

__all__ = ["nf4_linear"]
