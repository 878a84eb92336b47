"""x ⊙ m(seed) in Triton: one read and one write of x, the mask from a counter-based generator (Philox 4×32,
Salmon et al., SC 2011) keyed by the seed. The seed is read on the device, so nothing waits for it.

A counter gives four words, one for each of four neighbouring blocks of x; an element is kept if its word is at least
p·2³².
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrcompile.kernel_tools.fused import rounded
from lrcompile.kernel_tools.launches import Config, Launch, config

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
CONFIG = config(4, 1, BLOCK=512)
WORDS = 4


@triton.jit
def _drop(x, y, seed, numel, threshold, scale, BLOCK: tl.constexpr, WORDS: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    counter = program * BLOCK + tl.arange(0, BLOCK)
    words = tl.randint4x(tl.load(seed), counter)
    for i in tl.static_range(WORDS):
        element = (program * WORDS + i) * BLOCK + tl.arange(0, BLOCK)
        kept = words[i].to(tl.uint32, bitcast=True).to(tl.int64) >= threshold
        value = tl.load(x + element, mask=kept & (element < numel), other=0.0).to(tl.float32) * scale
        tl.store(y + element, rounded(value, y.dtype.element_ty), mask=element < numel)


def launch(x: Tensor, y: Tensor, seed: Tensor, p: float, config: Config = CONFIG) -> Launch:
    """Writes x ⊙ m into y; both contiguous, of one shape and of one dtype of `FLOATS`; seed int64 0-d."""
    block = dict(config.blocks)["BLOCK"]
    arguments = {
        "x": x, "y": y, "seed": seed, "numel": x.numel(), "threshold": round(p * 2**32), "scale": 1 / (1 - p),
        "WORDS": WORDS,
    }  # fmt: skip
    return Launch(_drop, (triton.cdiv(x.numel(), block * WORDS),), arguments, config)


def drop(x: Tensor, seed: Tensor, p: float) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        launch(x, y, seed, p)()
    return y


def ahead_of_time(capability: int) -> dict[str, Launch]:
    """Every dtype, on the input of Llama-3-8B's maps at 8192 rows, at an odd size, and beyond 2³¹ elements."""
    seed = torch.empty((), dtype=torch.int64, device="meta")
    return {
        f"{rows}x{columns} {dtype}": launch(x, x, seed, 0.1)
        for dtype in FLOATS
        for rows, columns in ((8192, 4096), (7, 13), (1 << 18, 14336))
        for x in [torch.empty(rows, columns, dtype=dtype, device="meta")]
    }
