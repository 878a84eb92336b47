"""From eight 4-bit codes to eight 16-bit values of the code book, in the registers of one thread.

Instructions, not bytes, bound a kernel that multiplies from NF4 codes: in the time in which an H200's memory brings an
element, it issues about four, and of those that permute, combine or shift bits two. A table in memory costs three and
one for the address. PTX's `prmt` selects four bytes out of eight by the low three bits of four codes: twice for each
byte of the values, a choice by the codes' fourth bit, and a shuffle of low bytes with high bytes make 21 instructions
for eight elements. Another unit, that of shared memory, can look up a byte's two values at once; where nothing else
keeps it busy it takes half of the codes (`values_partly_looked_up`).
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrcompile.kernel_tools.fused import INTERPRETED
from lrcompile.kernels.nf4_dequant.storage import CODEBOOK

COPIES = 32
"""Of each word of the table, one a column of the widest tile: see `planes`."""


def _ptx(halves: int) -> str:
    """Outputs: a word for each byte of the first `halves` halves of the word, its first value low, its second high;
    inputs: the word, four words of low bytes, four of high bytes.
    """
    word, low, high = 2 * halves, 2 * halves + 1, 2 * halves + 5
    lines = [
        ".reg .b32 up, low<2>, fourth<2>, a, b, l<2>, h<2>;",
        f"shl.b32 up, ${word}, 4;",
        f"and.b32 low0, ${word}, 0x77777777;",
        *["shr.b32 low1, low0, 16;"] * (halves - 1),
    ]
    for half in range(halves):
        # A selector with its top bit set repeats the sign of the byte: each code's fourth bit, as a mask of eight.
        lines += [f"prmt.b32 fourth{half}, up, ${word}, {('0xD9C8', '0xFBEA')[half]};"]
        for plane, first in (("l", low), ("h", high)):
            lines += [
                f"prmt.b32 a, ${first}, ${first + 1}, low{half};",
                f"prmt.b32 b, ${first + 2}, ${first + 3}, low{half};",
                f"lop3.b32 {plane}{half}, a, b, fourth{half}, 0xD8;",  # where the mask is set b, else a
            ]
        # Of a byte's two codes the higher comes first.
        lines += [f"prmt.b32 ${2 * half}, l{half}, h{half}, 0x4051;"]
        lines += [f"prmt.b32 ${2 * half + 1}, l{half}, h{half}, 0x6273;"]
    return "{\n" + "\n".join(lines) + "\n}"


PTX, FIRST_HALF = tl.constexpr(_ptx(2)), tl.constexpr(_ptx(1))
_COPIES = tl.constexpr(COPIES)


@cache
def planes(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The code book in `dtype`, of 16 bits, as the words that `prmt` selects from: int32 `[8, COPIES]`.

    Rows 0…3 hold the low bytes of values 4i…4i + 3, rows 4…7 the high bytes. All columns are the same: threads that
    load different ones keep the words in registers, while words known to be the same for a whole warp would be held
    once and copied before every use.
    """
    bits = torch.tensor(CODEBOOK).to(dtype).view(torch.int16).to(torch.int32) & 0xFFFF
    both = torch.stack([bits & 0xFF, bits >> 8]).to(torch.uint8)
    return both.view(8, 4).view(torch.int32).repeat(1, COPIES).to(device)


@cache
def pairs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The two values of every byte of codes in `dtype`, of 16 bits, as a word: int32 `[256]`."""
    values = torch.tensor(CODEBOOK).to(dtype)
    both = torch.stack([values[:, None].expand(16, 16), values[None, :].expand(16, 16)], -1)
    return both.reshape(512).view(torch.int32).to(device)


@triton.jit
def table(planes, column):
    """The words of `planes` for a tile of codes whose columns `column` counts."""
    at = planes + column % _COPIES
    return (tl.load(at), tl.load(at + _COPIES), tl.load(at + 2 * _COPIES), tl.load(at + 3 * _COPIES),
            tl.load(at + 4 * _COPIES), tl.load(at + 5 * _COPIES), tl.load(at + 6 * _COPIES),
            tl.load(at + 7 * _COPIES))  # fmt: skip


@triton.jit
def _selected(code, words):
    """What the assembly makes of one code, for the interpreter, which has none."""
    low, high = words[0], words[4]
    for i in tl.static_range(1, 4):
        low = tl.where(code >> 2 == i, words[i], low)
        high = tl.where(code >> 2 == i, words[4 + i], high)
    shift = 8 * (code & 3)
    return (low >> shift & 255) | (high >> shift & 255) << 8


@triton.jit
def _pair(packed, words, FIRST: tl.constexpr):
    """Both values of one byte, likewise."""
    return _selected(packed >> FIRST + 4 & 15, words) | _selected(packed >> FIRST & 15, words) << 16


@triton.jit
def values(packed, words, DTYPE: tl.constexpr):
    """c[q] `[..., columns, 2, 2, 2]` in DTYPE of the codes in int32 `[..., columns]`: eight consecutive elements each.

    `words` is `table(...)` with the shape of `packed` but for ones.
    """
    if INTERPRETED:
        p0, p1 = _pair(packed, words, 0), _pair(packed, words, 8)
        p2, p3 = _pair(packed, words, 16), _pair(packed, words, 24)
    else:
        p0, p1, p2, p3 = tl.inline_asm_elementwise(
            PTX, "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r",
            [packed, words[0], words[1], words[2], words[3], words[4], words[5], words[6], words[7]],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    return halves(tl.join(tl.join(p0, p2), tl.join(p1, p3)), DTYPE)


@triton.jit
def values_partly_looked_up(packed, words, pairs, DTYPE: tl.constexpr):
    """The same, the latter four of each eight elements from the 256 pairs, which go to shared memory."""
    if INTERPRETED:
        p0, p1 = _pair(packed, words, 0), _pair(packed, words, 8)
    else:
        p0, p1 = tl.inline_asm_elementwise(
            FIRST_HALF, "=r,=r,r,r,r,r,r,r,r,r,r",
            [packed, words[0], words[1], words[2], words[3], words[4], words[5], words[6], words[7]],
            dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    bytes = tl.join(packed >> 16 & 255, packed >> 24 & 255)
    p2, p3 = tl.split(tl.reshape(tl.gather(pairs, tl.ravel(bytes), 0), bytes.shape))
    return halves(tl.join(tl.join(p0, p2), tl.join(p1, p3)), DTYPE)


@triton.jit
def halves(pairs, DTYPE: tl.constexpr):
    """The two 16-bit values of each word `[..., 2]`, the lower first."""
    first = pairs.to(tl.int16).to(DTYPE, bitcast=True)
    second = (pairs >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    return tl.join(first, second)
