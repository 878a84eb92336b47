"""Affine quantization in groups: values ≈ offset + scale·code, with a scale and an offset for each group of them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Groups(NamedTuple):
    """n groups: codes uint8 `[n, group]` (two 4-bit ones a byte: `[n, group/2]`), scale and offset float32 `[n, 1]`."""

    codes: Tensor
    scale: Tensor
    offset: Tensor


def empty_groups(numbers: int, bits: int, group: int, device: torch.device | None = None) -> Groups:
    """What `quantize_groups` gives for so many values, not filled."""
    count, width = math.ceil(numbers / group), group if bits == 8 else group // 2
    floats = (torch.empty(count, 1, dtype=torch.float32, device=device) for _ in range(2))
    return Groups(torch.empty(count, width, dtype=torch.uint8, device=device), *floats)


def quantize_groups(values: Tensor, bits: int, group: int, generator: torch.Generator | None = None) -> Groups:
    """code = round((v − offset)/scale), offset = min v, scale = (max v − min v)/(2^bits − 1), over each `group` values.

    bits is 8 or 4, group is even; values are taken in storage order, in float32. With a `generator` rounding is
    stochastic, ⌊v + u⌋ with u uniform in [0, 1), so that codes are right on average: a group's least and largest value
    are codes themselves, nothing is ever clipped. A zero point among the codes, as in the official code, would clip
    groups whose values are all of one sign, and 4 bytes a group are all it saves.
    """
    top = 2**bits - 1
    flat = values.detach().reshape(-1).float()
    missing = -flat.numel() % group
    if missing:
        flat = torch.cat((flat, flat[-1:].expand(missing)))
    flat = flat.reshape(-1, group)
    offset = flat.amin(1, keepdim=True)
    scale = (flat.amax(1, keepdim=True) - offset) / top
    levels = (flat - offset) / torch.where(scale == 0, 1.0, scale)
    if generator is None:
        rounded = levels.round_()
    else:
        rounded = levels.add_(torch.rand(levels.shape, generator=generator, device=levels.device)).floor_()
    codes = rounded.clamp_(0, top).to(torch.uint8)
    return Groups(codes if bits == 8 else codes[:, 0::2] | codes[:, 1::2] << 4, scale, offset)


def dequantize_groups(held: Groups, shape: torch.Size | tuple[int, ...], bits: int, dtype: torch.dtype) -> Tensor:
    """offset + scale·code as `shape` in `dtype`, formed in float32."""
    codes = held.codes
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), -1).flatten(1)
    values = torch.addcmul(held.offset, codes.float(), held.scale).flatten()
    return values[: math.prod(shape)].reshape(shape).to(dtype)
