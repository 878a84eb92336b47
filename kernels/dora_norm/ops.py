"""`lrcompile_kernels::dora_norm` and `nf4_dora_norm`: n_i = ‖(W + s·BA)_i‖ from one reading of W.

They have no autograd of their own: to DoRA the norm is a constant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lrcompile.kernel_tools.shapes import capability, shape_class, storage
from lrcompile.kernel_tools.tuning import Way, run_fastest
from lrcompile.kernels.dora_norm.plain import norms, parts_of, parts_of_nf4
from lrcompile.kernels.nf4_dequant.checking import checked_storage
from lrcompile.kernels.nf4_dequant.ops import LIBRARY
from lrcompile.kernels.nf4_dequant.storage import Nf4

LIBRARY.define("dora_norm(Tensor W, Tensor A, Tensor B, Tensor scale, Tensor? squares) -> Tensor")
LIBRARY.define(
    "nf4_dora_norm(Tensor codes, Tensor absmax, Tensor? absmax_scale, Tensor? absmax_offset, Tensor A, Tensor B, "
    "Tensor scale, Tensor? squares, int block_size, bool transposed, ScalarType dtype) -> Tensor"
)


@torch.library.impl(LIBRARY, "dora_norm", "CompositeExplicitAutograd")
def dora_norm(W: Tensor, A: Tensor, B: Tensor, scale: Tensor, squares: Tensor | None) -> Tensor:
    """n_i = ‖(W + s·BA)_i‖ = √(‖W_i‖² + 2s⟨(WAᵀ)_i, B_i⟩ + s²⟨(B(AAᵀ))_i, B_i⟩)  (arXiv 2402.09353).

    W `[out, in]` in either storage order, A `[rank, in]`, B `[out, rank]`, scale 0-d; ‖W_i‖² `[out]`, which only a
    change of W changes, where the caller has kept it. n `[out]` in float32, or float64 for a float64 W; nothing of W's
    size is formed. RuntimeError where the shapes do not fit each other.
    """
    _check("dora_norm", W.shape, A, B, scale, squares)
    dtype = torch.promote_types(W.dtype, torch.float32)
    columns = W.stride(0) == 1 and W.stride(1) != 1
    return norms(parts_of(W.t() if columns else W, dtype), columns, A, B, scale, squares, dtype)


@torch.library.impl(LIBRARY, "nf4_dora_norm", "CompositeExplicitAutograd")
def nf4_dora_norm(
    codes: Tensor, absmax: Tensor, absmax_scale: Tensor | None, absmax_offset: Tensor | None, A: Tensor, B: Tensor,
    scale: Tensor, squares: Tensor | None, block_size: int, transposed: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """As `dora_norm` for W held as NF4, stored `[in, out]` if `transposed`; n in `dtype`, float32 or float64."""
    nf4, (rows, columns) = _checked_nf4(codes, absmax, absmax_scale, absmax_offset, A, B, scale, squares, block_size,
                                        transposed, dtype)  # fmt: skip
    return norms(parts_of_nf4(nf4, rows, columns, block_size, dtype), transposed, A, B, scale, squares, dtype)


def _checked_nf4(
    codes: Tensor, absmax: Tensor, absmax_scale: Tensor | None, absmax_offset: Tensor | None, A: Tensor, B: Tensor,
    scale: Tensor, squares: Tensor | None, block_size: int, transposed: bool, dtype: torch.dtype,
) -> tuple[Nf4, tuple[int, int]]:  # fmt: skip
    """The storage, and the shape of what it stores."""
    _check("nf4_dora_norm", (B.shape[0], A.shape[-1]), A, B, scale, squares)
    torch._check(
        dtype in (torch.float32, torch.float64),
        lambda: f"nf4_dora_norm: dtype is {dtype}, expected torch.float32 or torch.float64",
    )
    shape = (A.shape[1], B.shape[0]) if transposed else (B.shape[0], A.shape[1])
    return checked_storage("nf4_dora_norm", codes, absmax, absmax_scale, absmax_offset, *shape, block_size), shape


def _check(op: str, shape: Sequence[int], A: Tensor, B: Tensor, scale: Tensor, squares: Tensor | None) -> None:
    held = {"W": tuple(shape), "A": tuple(A.shape), "B": tuple(B.shape), "scale": tuple(scale.shape)}
    fits = A.dim() == B.dim() == len(shape) == 2 and A.shape[0] == B.shape[1] and scale.dim() == 0
    torch._check(
        fits and shape == (B.shape[0], A.shape[1]) and (squares is None or squares.shape == B.shape[:1]),
        lambda: (
            f"{op}: {held}, squares {None if squares is None else tuple(squares.shape)}; "
            "expected W [out, in], A [rank, in], B [out, rank], scale [], squares [out] or None"
        ),
    )


@torch.library.impl(LIBRARY, "dora_norm", "CUDA")
def fastest_dora_norm(W: Tensor, A: Tensor, B: Tensor, scale: Tensor, squares: Tensor | None) -> Tensor:
    _check("dora_norm", W.shape, A, B, scale, squares)
    dtype = torch.promote_types(W.dtype, torch.float32)
    return _fastest(f"dora_norm {W.dtype} {storage((W,))}", W, A, B, scale, squares, 0, False, dtype)


@torch.library.impl(LIBRARY, "nf4_dora_norm", "CUDA")
def fastest_nf4_dora_norm(
    codes: Tensor, absmax: Tensor, absmax_scale: Tensor | None, absmax_offset: Tensor | None, A: Tensor, B: Tensor,
    scale: Tensor, squares: Tensor | None, block_size: int, transposed: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    nf4, _ = _checked_nf4(codes, absmax, absmax_scale, absmax_offset, A, B, scale, squares, block_size,
                          transposed, dtype)  # fmt: skip
    op = f"nf4_dora_norm {'columns' if transposed else 'rows'} {block_size} {absmax.dtype}"
    return _fastest(op, list(nf4), A, B, scale, squares, block_size, transposed, dtype)


def _fastest(
    op: str, W: Tensor | list[Tensor | None], A: Tensor, B: Tensor, scale: Tensor, squares: Tensor | None,
    block_size: int, transposed: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    op += "" if squares is None else " squares known"
    shape = shape_class(op, dtype, B.shape[0], (A.shape[1],), (A.shape[0],), A.device)
    ways = partial(ways_to_norm, W, dtype, A.device)
    return run_fastest(shape, ways, W, A, B, scale, squares, block_size, transposed, dtype)


def ways_to_norm(W: Tensor | list[Tensor | None], dtype: torch.dtype, device: torch.device) -> Mapping[str, Way]:
    """aten, and the configurations of the kernel where n is float32."""
    ways: dict[str, Way] = {"aten": in_aten}
    if capability(device) >= 80 and dtype == torch.float32:
        from lrcompile.kernels.dora_norm import fused

        ways |= {str(config): partial(fused.norms, config=config) for config in fused.configs(W)}
    return ways


def in_aten(
    W: Tensor | Sequence[Tensor | None], A: Tensor, B: Tensor, scale: Tensor, squares: Tensor | None,
    block_size: int, transposed: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    if isinstance(W, Tensor):
        return dora_norm(W, A, B, scale, squares)
    return nf4_dora_norm(*Nf4._make(W), A, B, scale, squares, block_size, transposed, dtype)


@torch.library.register_fake("lrcompile_kernels::dora_norm", lib=LIBRARY)
def _(W: Tensor, A: Tensor, B: Tensor, scale: Tensor, squares: Tensor | None) -> Tensor:
    _check("dora_norm", W.shape, A, B, scale, squares)
    return W.new_empty(W.shape[:1], dtype=torch.promote_types(W.dtype, torch.float32))


@torch.library.register_fake("lrcompile_kernels::nf4_dora_norm", lib=LIBRARY)
def _(
    codes: Tensor, absmax: Tensor, absmax_scale: Tensor | None, absmax_offset: Tensor | None, A: Tensor, B: Tensor,
    scale: Tensor, squares: Tensor | None, block_size: int, transposed: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    _checked_nf4(codes, absmax, absmax_scale, absmax_offset, A, B, scale, squares, block_size, transposed, dtype)
    return A.new_empty(B.shape[:1], dtype=dtype)


def _flops(A: Any, B: Any) -> int:
    """WAᵀ, AAᵀ and B(AAᵀ)."""
    return 2 * A[0] * (B[0] * A[1] + A[0] * A[1] + A[0] * B[0])


@register_flop_formula(torch.ops.lrcompile_kernels.dora_norm)
def _(W: Any, A: Any, B: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return _flops(A, B)


@register_flop_formula(torch.ops.lrcompile_kernels.nf4_dora_norm)
def _(codes: Any, absmax: Any, absmax_scale: Any, absmax_offset: Any, A: Any, B: Any, *_: Any,
      out_shape: Any = None, **__: Any) -> int:  # fmt: skip
    return _flops(A, B)
