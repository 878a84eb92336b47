"""What every kernel of this folder is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lrcompile.kernels.nf4_dequant.decoding import dynamic, word_aligned
from lrcompile.kernels.nf4_dequant.storage import Nf4
from lrcompile.kernels.nf4_linear.nibbles import planes


@dataclass(frozen=True)
class Operands:
    """y = x·dq(W)ᵀ + b, or x·dq(W) + b where W is stored transposed, `[in, out]`.

    x `[rows, in]` and y `[rows, out]` contiguous, of one dtype, bfloat16 or float16; bias `[out]`, floating.
    """

    x: Tensor
    nf4: Nf4
    bias: Tensor | None
    y: Tensor
    block_size: int
    transposed: bool

    @property
    def rows(self) -> int:
        return self.x.shape[0]

    @property
    def in_features(self) -> int:
        return self.x.shape[1]

    @property
    def out_features(self) -> int:
        return self.y.shape[1]

    @property
    def span(self) -> int:
        """Elements of a row of W as stored, counted from its start, that always lie in one block: 64, 32, 8, or 0 where
        eight may not, the rows' length being no multiple of eight.
        """
        length = self.out_features if self.transposed else self.in_features
        return next((span for span in (64, 32, 8) if length % span == 0 and self.block_size % span == 0), 0)

    def arguments(self) -> dict[str, Any]:
        device = self.x.device
        return {
            "x": word_aligned(self.x), "codes": word_aligned(self.nf4.codes), "planes": planes(self.x.dtype, device),
            "absmax": self.nf4.absmax, "absmax_scale": self.nf4.absmax_scale, "absmax_offset": self.nf4.absmax_offset,
            "dynamic": dynamic(device), "bias": self.bias, "y": self.y,
            "rows": self.rows, "out_features": self.out_features, "in_features": self.in_features,
            "BLOCK_SIZE": self.block_size, "SPAN": self.span,
        }  # fmt: skip
