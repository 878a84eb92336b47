"""What y = x·dq(W)ᵀ costs by each path: bytes, FLOPs, instructions, and from those the fastest, without a device.

For compilers that must decide before anything runs, and for calls that nothing was measured for. Figures of a device
are what it was seen to reach, not what its data sheet says. Instructions an element were counted in the machine code
that `fused` compiles to for Hopper, those on bits twice where they bound it, since their unit is half as wide; none of
these times is a measurement.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

MOST_ROWS = 512
"""Beyond this, dequantizing once and an ordinary product are faster on every device known."""
SIXTEEN_BITS = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Device:
    """Bytes a second that a copy moves, FLOPs a second of dense 16-bit products, instructions a second (of a thread)
    that are issued, seconds from one kernel of a stream to the next.
    """

    bandwidth: float
    flops: float
    instructions: float
    launch: float


H200 = Device(4.3e12, 790e12, 132 * 128 * 1.755e9, 2e-6)
ISSUED = 0.7
"""Share of the instruction slots that kernels with barriers and waits are taken to fill."""


@dataclass(frozen=True)
class Cost:
    """Bytes to and from memory (what is read again is in the cache), FLOPs, instructions of a thread, kernels."""

    bytes: float
    flops: float
    instructions: float
    kernels: int

    def seconds(self, device: Device = H200) -> float:
        """The slowest of the three, plus the launches."""
        issue = self.instructions / (device.instructions * ISSUED)
        return max(self.bytes / device.bandwidth, self.flops / device.flops, issue) + self.kernels * device.launch


def stored_bytes(numel: int, block_size: int, double_quant: bool) -> float:
    """Half a byte an element; four bytes a block, or one and four for every 256 of them."""
    blocks = -(-numel // block_size)
    return numel / 2 + (blocks + 4 * -(-blocks // 256) if double_quant else 4 * blocks)


def cost(
    path: str, rows: int, out_features: int, in_features: int, block_size: int = 64, double_quant: bool = True
) -> tuple[Cost, ...]:
    """What runs one after the other, for `path` "gemv", "skinny", "tiled" or "dequantize", in 16 bits."""
    numel = out_features * in_features
    stored, flops = stored_bytes(numel, block_size, double_quant), 2.0 * rows * numel
    inputs_and_outputs = 2 * rows * (in_features + out_features)
    if path == "dequantize":
        whole = Cost(stored + 2 * numel, 0, 9 * numel, 1)
        return whole, Cost(2 * numel + inputs_and_outputs, flops, 0, 1)
    if path == "gemv":
        padded, an_element = -(-rows // 8) * 8, 4.4 if rows <= 8 else 4.6
    elif path == "skinny":
        tile = min(max(16, 1 << (rows - 1).bit_length()), 128)
        padded, an_element = -(-rows // tile) * tile, max(5.8, 4.2 + 0.03 * tile) * -(-rows // tile)
    elif path == "tiled":
        tile = min(max(16, 1 << (rows - 1).bit_length()), 256)
        padded, an_element = -(-rows // tile) * tile, (8.6 if tile <= 64 else 10.0) * -(-rows // tile)
    else:
        raise ValueError(f"path is {path!r}; expected gemv, skinny, tiled or dequantize")
    return (Cost(stored + inputs_and_outputs, 2.0 * padded * numel, an_element * numel, 1),)


def paths(
    rows: int, out_features: int, in_features: int, dtype: torch.dtype, block_size: int, transposed: bool
) -> list[str]:
    """What can compute it: always "dequantize"; kernels up to `MOST_ROWS` rows of 16-bit products, where the rows of W
    as stored are multiples of 32 long ("tiled", which scales first: of 8).
    """
    length = out_features if transposed else in_features
    numel = out_features * in_features
    found = []
    if dtype in SIXTEEN_BITS and 0 < rows <= MOST_ROWS and 0 < numel < 1 << 33:  # words of codes count in 32 bits
        if not transposed and length % 32 == 0:
            found += ["gemv"] if rows <= 16 else ["skinny"]
        if length % 8 == 0:
            found += ["tiled"]
    return [*found, "dequantize"]


def best_path(
    rows: int, out_features: int, in_features: int, dtype: torch.dtype = torch.bfloat16, block_size: int = 64,
    transposed: bool = False, *, double_quant: bool = True, device: Device = H200,
) -> str:  # fmt: skip
    """The one of `paths` with the least predicted time; the first three arguments are M, N and K of the product."""

    def predicted(path: str) -> float:
        steps = cost(path, rows, out_features, in_features, block_size, double_quant)
        return sum(step.seconds(device) for step in steps)

    return min(paths(rows, out_features, in_features, dtype, block_size, transposed), key=predicted)
