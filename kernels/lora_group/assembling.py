"""`lrcompile_kernels::stacked` and `added`: what maps of one input put together before and after their products.

They have no autograd of their own: only functions of `lrcompile.lowered` call them, where a backward is written. One
operation each, because a compiler makes a kernel of its own for each shape and number of parts: on a CPU a file of C++.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lrcompile.kernels.lora_linear.ops import LIBRARY

LIBRARY.define("stacked(Tensor[] parts, int dim, int phase) -> Tensor")
LIBRARY.define("added(Tensor[] parts) -> Tensor")


@torch.library.impl(LIBRARY, "stacked", "CompositeExplicitAutograd")
def stacked(parts: Sequence[Tensor], dim: int, phase: int) -> Tensor:
    """[P₁; P₂; …], or side by side with `dim` 1, of the widest of their dtypes: as `torch.cat`.

    `phase`, FORWARD or BACKWARD, has no effect on the value: it tells the two passes of a training step apart, so that
    no stack of factors is one common subexpression of both and lives in between.
    """
    return torch.cat(list(parts), dim)


@torch.library.impl(LIBRARY, "added", "CompositeExplicitAutograd")
def added(parts: Sequence[Tensor]) -> Tensor:
    """P₁ + P₂ + …, two of them or more, of one shape and dtype."""
    first, second, *others = parts
    total = first + second
    for other in others:
        total += other
    return total


@torch.library.register_fake("lrcompile_kernels::stacked", lib=LIBRARY)
def _(parts: Sequence[Tensor], dim: int, phase: int) -> Tensor:
    return torch.cat(list(parts), dim)


@torch.library.register_fake("lrcompile_kernels::added", lib=LIBRARY)
def _(parts: Sequence[Tensor]) -> Tensor:
    return parts[0].new_empty(parts[0].shape)
