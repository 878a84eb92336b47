"""Into how many parts a sum is cut where there are too few tiles to keep a device busy."""

from __future__ import annotations

import torch

FEWEST_STEPS = 4
"""Of a program along the inner elements: with fewer, starting up costs more than the others help."""
ASSUMED_PROCESSORS = 132
"""Where no device says how many it has: an H100's or H200's."""


def parts(tiles: int, steps: int, device: torch.device) -> int:
    """Programs that share a tile, a power of two: as many as keep the device busy, none of them with too little."""
    processors = ASSUMED_PROCESSORS
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    shared = 1
    while 2 * shared * tiles <= 2 * processors and 2 * shared * FEWEST_STEPS <= steps:
        shared *= 2
    return shared
