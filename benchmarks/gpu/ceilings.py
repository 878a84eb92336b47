"""What the device reaches at best: bytes a second of a copy, read and written, and FLOPs of a bf16 product."""

from __future__ import annotations

from functools import partial

import torch

from gpu.section import Section
from gpu.timing import measure


def main() -> None:
    section = Section()
    size = 1 << (16 if section.dry else 31)
    source = torch.empty(size, dtype=torch.uint8, device=section.device).random_()
    copied = measure([partial(torch.empty_like(source).copy_, source)], section.dry)
    section.row(what="copy", rate=2e6 * size / copied["us"], unit="bytes/s", **copied)
    del source
    side = 64 if section.dry else 8192
    x, y = (torch.randn(side, side, dtype=torch.bfloat16, device=section.device) for _ in range(2))
    product = measure([partial(torch.mm, x, y)], section.dry)
    section.row(what="bf16 product", rate=2e6 * side**3 / product["us"], unit="FLOP/s", **product)


if __name__ == "__main__":
    main()
