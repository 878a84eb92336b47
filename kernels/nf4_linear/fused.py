"""The ways to multiply by an NF4 weight in Triton: which kernels take which operands, in which configurations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from lrcompile.kernel_tools.launches import Config, Launch
from lrcompile.kernels.nf4_dequant.storage import Nf4, nf4_shapes
from lrcompile.kernels.nf4_linear import gemv, skinny, tiled
from lrcompile.kernels.nf4_linear.operands import Operands

LAUNCHES: dict[str, Callable[[Operands, Config], list[Launch]]] = {
    "gemv": gemv.launches,
    "skinny": skinny.launches,
    "tiled": tiled.launches,
}


def configs(path: str, capability: int, rows: int) -> tuple[Config, ...]:
    """What may be chosen for this many rows, the tile that fits best first; nothing before Ampere."""
    if capability < 80:
        return ()
    if path == "gemv":
        return gemv.CONFIGS
    known = {"skinny": skinny.CONFIGS, "tiled": tiled.CONFIGS}[path][90 if capability >= 90 else 80]
    fitting = [config for config in known if dict(config.blocks)["ROWS"] < 2 * max(rows, 16)]
    return tuple(sorted(fitting, key=lambda config: -dict(config.blocks)["ROWS"]))


def nf4_linear(
    x: Tensor, stored: Sequence[Tensor | None], bias: Tensor | None, out_features: int, block_size: int,
    transposed: bool, *, path: str, config: Config,
) -> Tensor:  # fmt: skip
    """y `[rows, out]` of x `[rows, in]`, contiguous, by one kernel in one configuration."""
    y = x.new_empty(x.shape[0], out_features)
    nf4 = Nf4._make(stored)
    for launch in LAUNCHES[path](Operands(x, nf4, bias, y, block_size, transposed), config):
        launch()
    return y


def ways(path: str, capability: int, rows: int) -> dict[str, Callable[..., Tensor]]:
    """`nf4_linear` by name, for every configuration of `path`."""
    known = configs(path, capability, rows)
    return {f"{path} {config}": partial(nf4_linear, path=path, config=config) for config in known}


def ahead_of_time(capability: int) -> dict[str, Launch]:
    """Every configuration on a map of Llama-3-8B and on one of odd size, and the sum of partial results."""
    found: dict[str, Launch] = {}
    for dtype in (torch.bfloat16, torch.float16):
        for path, rows, transposed in (
            ("gemv", 1, False), ("gemv", 16, False), ("skinny", 256, False), ("tiled", 256, False), ("tiled", 256, True)
        ):  # fmt: skip
            for name, operands in _examples(rows, transposed, dtype).items():
                for config in configs(path, capability, rows):
                    launch, *after = LAUNCHES[path](operands, config)
                    found[f"{path} {rows} {'xW' if transposed else 'xWT'} {name} {dtype} {config}"] = launch
                    found |= {f"sum {name} {dtype}": more for more in after}
    return found


def _examples(rows: int, transposed: bool, dtype: torch.dtype) -> dict[str, Operands]:
    """Aligned, with scales quantized again; odd outputs, rows not multiples of 64, a bias, large blocks."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    found = {}
    for name, n, k, block_size, double in (("4096x4096", 4096, 4096, 64, True), ("1000x1120", 1000, 1120, 4096, False)):
        codes, blocks, scales = nf4_shapes(n * k, block_size)
        maxima = empty(blocks, dtype=torch.uint8 if double else torch.float32)
        second = (empty(scales, dtype=torch.float32), empty(dtype=torch.float32)) if double else (None, None)
        nf4 = Nf4(empty(codes, dtype=torch.uint8), maxima, *second)
        bias = None if double else empty(n)
        found[name] = Operands(empty(rows, k), nf4, bias, empty(rows, n), block_size, transposed)
    return found
