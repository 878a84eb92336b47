"""`lrcompile_kernels::scaled_factor` and `diagonal_gradients`: s·diag(r)·F·diag(c), and the gradients of r and c.

They have no autograd of their own: only functions of `lrcompile.lowered` call them, where a backward is written. One
operation each, because a compiler makes a kernel of its own for every shape of such a product and of the sums in its
gradient: on a CPU files of C++, more of them than for all the rest of an adapter.
"""

from __future__ import annotations

import torch
from torch import Tensor

FORWARD, BACKWARD = 0, 1

LIBRARY = torch.library.Library("lrcompile_kernels", "FRAGMENT")
LIBRARY.define("scaled_factor(Tensor factor, Tensor? rows, Tensor? columns, Tensor? scale, int phase) -> Tensor")
LIBRARY.define(
    "diagonal_gradients(Tensor gradient, Tensor factor, Tensor? rows, Tensor? columns, Tensor? scale) -> Tensor[]"
)


@torch.library.impl(LIBRARY, "scaled_factor", "CompositeExplicitAutograd")
def scaled_factor(
    factor: Tensor, rows: Tensor | None, columns: Tensor | None, scale: Tensor | None, phase: int
) -> Tensor:
    """s·diag(r)·F·diag(c): F `[n, m]`, r with n numbers and c with m in whatever shape, s 0-d; None for ones.

    Multiplied in float32 or wider and rounded once, to the widest dtype of the three. `phase`, FORWARD or BACKWARD, has
    no effect on the value: it tells the two passes of a training step apart, so that no product is one common
    subexpression of both and lives in between. RuntimeError if both diagonals are None or one has another length.
    """
    _check(factor, rows, columns)
    dtype = _dtype(factor, rows, columns)
    r, c = _vectors(rows, columns, dtype)
    if c is None:
        assert r is not None
        return (factor * _times(r, scale)[:, None]).to(dtype)
    product = factor * _times(c, scale)
    return (product if r is None else product.mul_(r[:, None])).to(dtype)


@torch.library.impl(LIBRARY, "diagonal_gradients", "CompositeExplicitAutograd")
def diagonal_gradients(
    gradient: Tensor, factor: Tensor, rows: Tensor | None, columns: Tensor | None, scale: Tensor | None
) -> list[Tensor]:
    """dr = s·(G ⊙ F)·c and dc = s·(G ⊙ F)ᵀ·r of those that are given, G being the gradient of s·diag(r)·F·diag(c).

    Summed in float32 or wider; each in the dtype and shape of its diagonal.
    """
    _check(factor, rows, columns)
    dtype = _dtype(factor, rows, columns)
    r, c = _vectors(rows, columns, dtype)
    both = gradient.to(torch.promote_types(dtype, torch.float32)) * factor
    found = []
    if rows is not None:
        dr = _times(both.sum(1) if c is None else both @ c, scale)
        found.append(dr.to(rows.dtype).view(rows.shape))
    if columns is not None:
        dc = _times(both.sum(0) if r is None else r @ both, scale)
        found.append(dc.to(columns.dtype).view(columns.shape))
    return found


def _vectors(rows: Tensor | None, columns: Tensor | None, dtype: torch.dtype) -> list[Tensor | None]:
    wide = torch.promote_types(dtype, torch.float32)
    return [None if each is None else each.reshape(-1).to(wide) for each in (rows, columns)]


def _times(vector: Tensor, scale: Tensor | None) -> Tensor:
    return vector if scale is None else vector * scale


def _dtype(factor: Tensor, *diagonals: Tensor | None) -> torch.dtype:
    dtype = factor.dtype
    for each in diagonals:
        dtype = dtype if each is None else torch.promote_types(dtype, each.dtype)
    return dtype


def _check(factor: Tensor, rows: Tensor | None, columns: Tensor | None) -> None:
    given = {"rows": rows, "columns": columns}
    fits = factor.dim() == 2 and not rows is columns is None
    lengths = zip(given.values(), factor.shape, strict=False)
    torch._check(
        fits and all(each is None or each.numel() == length for each, length in lengths),
        lambda: (
            f"factor {tuple(factor.shape)}, "
            + ", ".join(f"{name} {None if each is None else tuple(each.shape)}" for name, each in given.items())
            + "; expected a matrix, and a number for each of its rows, for each of its columns, or both"
        ),
    )


@torch.library.register_fake("lrcompile_kernels::scaled_factor", lib=LIBRARY)
def _(factor: Tensor, rows: Tensor | None, columns: Tensor | None, scale: Tensor | None, phase: int) -> Tensor:
    _check(factor, rows, columns)
    return factor.new_empty(factor.shape, dtype=_dtype(factor, rows, columns))


@torch.library.register_fake("lrcompile_kernels::diagonal_gradients", lib=LIBRARY)
def _(
    gradient: Tensor, factor: Tensor, rows: Tensor | None, columns: Tensor | None, scale: Tensor | None
) -> list[Tensor]:
    _check(factor, rows, columns)
    return [each.new_empty(each.shape) for each in (rows, columns) if each is not None]
