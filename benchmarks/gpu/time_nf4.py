"""NF4: dequantizing alone, products by codes for 1…512 rows, and DoRA's norm, against their floors.

Beside ours: dequantizing into cuBLAS's product, the bf16 weight itself, and bitsandbytes' fused path where it is.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu.operands import DRY_SHAPES, RANK, SHAPES, random
from gpu.section import Section
from gpu.timing import Floor, copies, measure
from lrcompile.dialect import norm
from lrcompile.kernels.nf4_dequant import quantize_nf4
from lrcompile.kernels.nf4_linear import ops

OPS = torch.ops.lrcompile_kernels
ROWS = (1, 4, 16, 32, 64, 128, 256, 512)
BLOCK = 64
assert norm, "importing it registers dora_norm"


def main() -> None:
    section = Section()
    floor = Floor(section.earlier("ceilings"))
    has_bitsandbytes = not section.dry and importlib.util.find_spec("bitsandbytes") is not None
    if not has_bitsandbytes:
        section.row(what="bitsandbytes", skipped="dry run" if section.dry else "not installed")
    for name, (inner, out) in (DRY_SHAPES if section.dry else SHAPES).items():
        if section.over(name):
            return
        weights = [_Weight(section, out, inner, has_bitsandbytes) for _ in range(copies(out * inner // 2, section.dry))]
        shape = {"map": name, "inner": inner, "out": out}
        stored = out * inner * (0.5 + 1 / BLOCK)
        _time(
            section, floor, {"what": "dequantize", **shape}, weights, _Weight.dequantized, 0, stored + 2 * out * inner
        )
        moved = 2 * (out * inner + RANK * (inner + out))
        _time(section, floor, {"what": "dora_norm", **shape}, weights, _Weight.norm, 4 * RANK * out * inner, moved)
        for rows in ROWS[:2] if section.dry else ROWS:
            if section.over(f"{name} {rows}"):
                return
            x = random(rows, inner, dtype=torch.bfloat16, device=section.device)
            flops, acts = 2.0 * rows * inner * out, 2 * rows * (inner + out)
            ways: dict[str, tuple[Callable[..., Any], float]] = {
                "nf4_linear": (_Weight.product, stored + acts),
                "dequantize, then cuBLAS": (_Weight.dequantized_product, stored + acts),
                "bf16 weight": (_Weight.dense_product, 2 * out * inner + acts),
            }
            if has_bitsandbytes:
                ways["bitsandbytes"] = (_Weight.bitsandbytes_product, stored + acts)
            for what, (run, moved) in ways.items():
                _time(
                    section, floor, {"what": what, "rows": rows, **shape}, weights, partial(_on, run, x), flops, moved
                )
        del weights


def _on(run: Callable[..., Any], x: Tensor, weight: _Weight) -> Any:
    return run(weight, x)


def _time(
    section: Section, floor: Floor, row: dict[str, Any], weights: list[_Weight], run: Callable[[_Weight], Any],
    flops: float, moved: float,
) -> None:  # fmt: skip
    found = measure([partial(run, each) for each in weights], section.dry)
    section.row(**row, flops=flops, bytes=moved, **found, **floor.share(found, flops, moved))


class _Weight:
    def __init__(self, section: Section, out: int, inner: int, has_bitsandbytes: bool):
        make = partial(random, dtype=torch.bfloat16, device=section.device)
        self.W, self.A, self.B = make(out, inner), make(RANK, inner), make(out, RANK)
        self.scale = torch.tensor(2.0, device=section.device)
        self.out, self.inner = out, inner
        self.nf4 = tuple(quantize_nf4(self.W, BLOCK, False))
        if has_bitsandbytes:
            import bitsandbytes.functional as functional

            self.theirs = functional.quantize_4bit(self.W, blocksize=BLOCK, quant_type="nf4")

    def dequantized(self) -> Tensor:
        return OPS.nf4_dequantize(*self.nf4, self.out, self.inner, BLOCK, torch.bfloat16, 0)

    def norm(self) -> Tensor:
        return torch.ops.lrcompile.dora_norm(self.W, self.A, self.B, self.scale)

    def product(self, x: Tensor) -> Tensor:
        return OPS.nf4_linear(x, *self.nf4, None, self.out, self.inner, BLOCK, False, torch.bfloat16)

    def dequantized_product(self, x: Tensor) -> Tensor:
        return ops.dequantized_linear(x, self.nf4, None, self.out, BLOCK, False)

    def dense_product(self, x: Tensor) -> Tensor:
        return x @ self.W.t()

    def bitsandbytes_product(self, x: Tensor) -> Tensor:
        import bitsandbytes

        codes, state = self.theirs
        return bitsandbytes.matmul_4bit(x, codes.t(), quant_state=state)


if __name__ == "__main__":
    main()
