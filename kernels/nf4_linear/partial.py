"""y = Σ_s partial_s + b: where there are too few tiles for the device, several programs share one and this adds up.

The order of the sum is fixed, so the same inputs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lrcompile.kernel_tools.launches import Launch, config
from lrcompile.kernels.nf4_linear.operands import Operands

CONFIG = config(4, 1, BLOCK=1024)


@triton.jit(do_not_specialize=["rows", "parts"])
def _sum(partial, bias, y, rows, out_features, parts, BLOCK: tl.constexpr):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    numel = rows.to(tl.int64) * out_features
    within = element < numel
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        total += tl.load(partial + part * numel + element, mask=within, other=0.0)
    if bias is not None:
        total += tl.load(bias + element % out_features, mask=within, other=0.0).to(tl.float32)
    tl.store(y + element, total.to(y.dtype.element_ty), mask=within)


def shared(launch: Launch, operands: Operands, parts: int) -> list[Launch]:
    """`launch`, whose grid's second axis counts the parts, and if there is more than one what adds them up."""
    if parts == 1:
        return [launch]
    y = operands.y
    partial = torch.empty(parts, *y.shape, dtype=torch.float32, device=y.device)
    launch.arguments.update(y=partial, bias=None)
    arguments = {"partial": partial, "bias": operands.bias, "y": y, "rows": y.shape[0], "out_features": y.shape[1]}
    blocks = dict(CONFIG.blocks)
    grid = (triton.cdiv(y.numel(), blocks["BLOCK"]),)
    return [launch, Launch(_sum, grid, {**arguments, "parts": parts}, CONFIG)]
