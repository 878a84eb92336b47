"""From eight 4-bit codes to eight 16-bit values of the code book, in the registers of one thread.

Instructions, not bytes, bound a kernel that multiplies from NF4 codes: an H200 issues about four an element in the time
its memory takes to bring the element. A table in memory costs three and one for the address. PTX's `prmt` selects four
bytes out of eight by the low three bits of four codes: twice for each byte of the values, a choice by the codes' fourth
bit, and a shuffle of low bytes with high bytes make 21 instructions for eight elements.
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


def _ptx() -> str:
    """$0…$3: elements 2i in the low and 2i + 1 in the high half; $4: the word; $5…$8 low bytes, $9…$12 high bytes."""
    lines = [
        ".reg .b32 up, low<2>, fourth<2>, a, b, l<2>, h<2>;",
        "shl.b32 up, $4, 4;",
        "and.b32 low0, $4, 0x77777777;",
        "shr.b32 low1, low0, 16;",
        # A selector with its top bit set repeats the sign of the byte: each code's fourth bit, as a mask of eight.
        "prmt.b32 fourth0, up, $4, 0xD9C8;",
        "prmt.b32 fourth1, up, $4, 0xFBEA;",
    ]
    for half in (0, 1):
        for plane, first in (("l", 5), ("h", 9)):
            lines += [
                f"prmt.b32 a, ${first}, ${first + 1}, low{half};",
                f"prmt.b32 b, ${first + 2}, ${first + 3}, low{half};",
                f"lop3.b32 {plane}{half}, a, b, fourth{half}, 0xD8;",  # where the mask is set b, else a
            ]
        # Of a byte's two codes the higher comes first.
        lines += [f"prmt.b32 ${2 * half}, l{half}, h{half}, 0x4051;"]
        lines += [f"prmt.b32 ${2 * half + 1}, l{half}, h{half}, 0x6273;"]
    return "{\n" + "\n".join(lines) + "\n}"


PTX = tl.constexpr(_ptx())
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
def values(packed, words, DTYPE: tl.constexpr):
    """c[q] `[..., columns, 2, 2, 2]` in DTYPE of the codes in int32 `[..., columns]`: eight consecutive elements each.

    `words` is `table(...)` with the shape of `packed` but for ones.
    """
    if INTERPRETED:
        p0 = _selected(packed >> 4 & 15, words) | _selected(packed & 15, words) << 16
        p1 = _selected(packed >> 12 & 15, words) | _selected(packed >> 8 & 15, words) << 16
        p2 = _selected(packed >> 20 & 15, words) | _selected(packed >> 16 & 15, words) << 16
        p3 = _selected(packed >> 28 & 15, words) | _selected(packed >> 24 & 15, words) << 16
    else:
        p0, p1, p2, p3 = tl.inline_asm_elementwise(
            PTX, "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r",
            [packed, words[0], words[1], words[2], words[3], words[4], words[5], words[6], words[7]],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    return halves(tl.join(tl.join(p0, p2), tl.join(p1, p3)), DTYPE)


@triton.jit
def halves(pairs, DTYPE: tl.constexpr):
    """The two 16-bit values of each word `[..., 2]`, the lower first."""
    first = pairs.to(tl.int16).to(DTYPE, bitcast=True)
    second = (pairs >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    return tl.join(first, second)
