"""What every op on NF4 storage refuses, in its kernel and in its fake alike."""

from __future__ import annotations

import torch
from torch import Tensor

from lrcompile.kernels.nf4_dequant.storage import BLOCK_SIZES, Nf4, nf4_shapes


def checked_storage(
    op: str, codes: Tensor, absmax: Tensor, absmax_scale: Tensor | None, absmax_offset: Tensor | None,
    rows: int, columns: int, block_size: int,
) -> Nf4:  # fmt: skip
    """The tensors as one `Nf4`, where they are those of a weight of `rows` × `columns` in blocks of `block_size`.

    RuntimeError otherwise: codes too short would be read past their end.
    """
    torch._check(block_size in BLOCK_SIZES, lambda: f"{op}: block_size is {block_size}, expected one of {BLOCK_SIZES}")
    n_codes, n_blocks, n_scales = nf4_shapes(rows * columns, block_size)
    held: list[tuple[str, Tensor, tuple[int, ...], torch.dtype]] = [("codes", codes, (n_codes,), torch.uint8)]
    if absmax_scale is None or absmax_offset is None:
        torch._check(
            absmax_scale is None and absmax_offset is None,
            lambda: f"{op}: absmax_scale and absmax_offset come together (double quantization) or not at all",
        )
        held += [("absmax", absmax, (n_blocks,), torch.float32)]
    else:
        held += [
            ("absmax", absmax, (n_blocks,), torch.uint8),
            ("absmax_scale", absmax_scale, (n_scales,), torch.float32),
            ("absmax_offset", absmax_offset, (), torch.float32),
        ]
    for name, tensor, shape, dtype in held:
        torch._check(
            tuple(tensor.shape) == shape and tensor.dtype == dtype,
            lambda name=name, tensor=tensor, shape=shape, dtype=dtype: (
                f"{op}: {name} is {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {shape} for a weight of "
                f"{rows} x {columns} in blocks of {block_size}"
            ),
        )
    return Nf4(codes, absmax, absmax_scale, absmax_offset)
