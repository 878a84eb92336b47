"""Dropout whose mask is a function of a seed, so that a backward pass draws it again instead of keeping it."""

from lrcompile.kernels.dropout.reference import mask

__all__ = ["mask"]
