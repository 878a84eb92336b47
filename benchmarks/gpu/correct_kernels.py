"""Every way to compute every op, on this device, at odd sizes and within NaN, against float64: max|y − y64|/(u·|x||W|).

A correctly rounded sum stays under 4 (16 for products by codes, whose factors are rounded before they are summed).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu.operands import bound_ratio, poison, random, within_nan
from gpu.section import Section
from lrcompile.kernel_tools.tuning import Unfit
from lrcompile.kernels.lora_group import ops as group
from lrcompile.kernels.lora_linear import fused, fused_gradients
from lrcompile.kernels.lora_linear import ops as linear
from lrcompile.kernels.nf4_dequant import dequantize_nf4, quantize_nf4
from lrcompile.kernels.nf4_dequant import fused as fused_dequant
from lrcompile.kernels.nf4_dequant import ops as dequant
from lrcompile.kernels.nf4_linear import fused as fused_nf4
from lrcompile.kernels.nf4_linear import ops as nf4

LIMIT, LIMIT_OF_CODES = 4, 16
SIZES = (
    (1, 33, 1, 18),
    (5, 70, 3, 9),
    (65, 130, 20, 50),
    (130, 257, 64, 129),
    (3, 4096, 16, 1024),
    (257, 1024, 16, 4096),
)
"""Rows, in, rank, out: odd ones that end within blocks, and two whose rows load in vectors."""
DRY = ((5, 64, 3, 24),)
Ways = Mapping[str, Callable[..., Any]]


def main() -> None:
    section = Section()
    dtypes = (torch.bfloat16,) if section.dry else (torch.bfloat16, torch.float16, torch.float32)
    for dtype in dtypes:
        for sizes in DRY if section.dry else SIZES:
            for check in (_sums, _factors, _groups, _codes):
                if section.over(f"{check.__name__} {sizes} {dtype}"):
                    return
                check(section, *sizes, dtype)


def _sums(section: Section, rows: int, inner: int, rank: int, out: int, dtype: torch.dtype) -> None:
    """Forward with a bias, x·Wᵀ + S·Bᵀ + b, and the input's gradient, dy·W + dS·A."""
    make = partial(random, dtype=dtype, device=section.device)
    x, S, W, B, bias = make(rows, inner), make(rows, rank), make(out, inner), make(out, rank), make(out)
    dy, dS, A = make(rows, out), make(rows, rank), make(rank, inner)
    for name, xs, Ms, b in (("y", [x, S], [W.t(), B.t()], bias), ("dx", [dy, dS], [W, A], None)):
        exact = sum(x.double() @ M.double() for x, M in zip(xs, Ms, strict=True))
        size = sum(x.double().abs() @ M.double().abs() for x, M in zip(xs, Ms, strict=True))
        assert isinstance(exact, Tensor)
        assert isinstance(size, Tensor)
        if b is not None:
            exact, size = exact + b.double(), size + b.double().abs()
        for margin, given in _margins(xs, Ms):
            pair = (given[: len(xs)], given[len(xs) :])
            ways: Ways = linear.ways_to_sum(*pair, b)
            if section.dry:
                ways = {**ways, **_first(fused.configs(90, *pair), fused.sum_of_products)}
            _compare(section, f"sum_of_products {name} {margin}", ways, (*pair, b), [exact], [size], LIMIT)


def _factors(section: Section, rows: int, inner: int, rank: int, out: int, dtype: torch.dtype) -> None:
    make = partial(random, dtype=dtype, device=section.device)
    dy, B, S = make(rows, out), make(out, rank), make(rows, rank)
    a, b, s = (tensor.double() for tensor in (dy, B, S))
    exact, sizes = [a @ b, a.t() @ s], [a.abs() @ b.abs(), a.abs().t() @ s.abs()]
    for margin, given in _margins([dy, B], [S]):
        ways: Ways = linear.ways_to_differentiate(*given)
        if section.dry:
            known = fused_gradients.configs(90, given[:1], given[1:2], given[2:])
            ways = {**ways, **_first(known, fused_gradients.factor_gradients_of_one)}
        _compare(section, f"factor_gradients {margin}", ways, given, exact, sizes, LIMIT)


def _groups(section: Section, rows: int, inner: int, rank: int, out: int, dtype: torch.dtype) -> None:
    """Three maps of one input, widths and ranks apart."""
    make = partial(random, dtype=dtype, device=section.device)
    widths, ranks = (out, out + 7, 2 * out), (rank, 2 * rank, rank + 3)
    x, Ws = make(rows, inner), [make(width, inner) for width in widths]
    Ss, Bs = [make(rows, r) for r in ranks], [make(o, r) for o, r in zip(widths, ranks, strict=True)]
    dys, biases = [make(rows, width) for width in widths], [None, make(widths[1]), None]
    exact, sizes = [], []
    for W, S, B, bias in zip(Ws, Ss, Bs, biases, strict=True):
        b = torch.zeros((), dtype=torch.float64, device=section.device) if bias is None else bias.double()
        exact.append(x.double() @ W.double().t() + S.double() @ B.double().t() + b)
        sizes.append(x.double().abs() @ W.double().abs().t() + S.double().abs() @ B.double().abs().t() + b.abs())
    given = (
        within_nan(x),
        [within_nan(W) for W in Ws],
        biases,
        [within_nan(S) for S in Ss],
        [within_nan(B) for B in Bs],
    )
    _compare(section, "group_products", group.ways_to_multiply(*given), given, exact, sizes, LIMIT)
    doubles = [tuple(t.double() for t in each) for each in zip(dys, Bs, Ss, strict=True)]
    exact = [dy @ B for dy, B, _ in doubles] + [dy.t() @ S for dy, _, S in doubles]
    sizes = [dy.abs() @ B.abs() for dy, B, _ in doubles] + [dy.abs().t() @ S.abs() for dy, _, S in doubles]
    inputs = ([within_nan(dy) for dy in dys], given[4], given[3])
    _compare(section, "group_gradients", group.ways_to_differentiate(*inputs), inputs, exact, sizes, LIMIT)


def _codes(section: Section, rows: int, inner: int, rank: int, out: int, dtype: torch.dtype) -> None:
    """NF4: the weight bit for bit, and products by it, either way round."""
    for double, transposed in ((True, False), (False, True)):
        shape = (inner, out) if transposed else (out, inner)
        stored = quantize_nf4(random(*shape, dtype=torch.float32, device=section.device), 64, double)
        W = dequantize_nf4(stored, shape, 64, dtype)
        ways: Ways = dequant.ways_to_dequantize(section.device, dtype)
        if section.dry:
            ways = {**ways, **_first(fused_dequant.CONFIGS, fused_dequant.dequantized)}
        for name, way in ways.items():
            poison(W.numel() * W.itemsize, section.device)
            same = bool(torch.equal(way(list(stored), *shape, 64, dtype), W))
            section.row(op="nf4_dequantize", way=name, shape=list(shape), dtype=str(dtype), double=double, ok=same)
        x, bias = (
            random(rows, inner, dtype=dtype, device=section.device),
            random(out, dtype=dtype, device=section.device),
        )
        exact_W = dequantize_nf4(stored, shape, 64, torch.float64)
        exact_W = exact_W if transposed else exact_W.t()
        exact, size = x.double() @ exact_W + bias.double(), x.double().abs() @ exact_W.abs() + bias.double().abs()
        given = (x, list(stored), bias, out, 64, transposed)
        what = f"nf4_linear {'xW' if transposed else 'xWT'} {'double' if double else 'single'}"
        ways = nf4.ways_to_multiply(*given)
        if section.dry and inner % 64 == 0:
            ways = {**ways, **dict(list(fused_nf4.ways("tiled", 90, rows).items())[-1:])}
        _compare(section, what, ways, given, [exact], [size], LIMIT_OF_CODES)


def _margins(*operands: Sequence[Tensor]) -> Iterable[tuple[str, list[Tensor]]]:
    given = [tensor for tensors in operands for tensor in tensors]
    yield "packed", given
    yield "within NaN", [within_nan(tensor) for tensor in given]


def _first(configs: Sequence[Any], run: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    return {f"interpreted {config}": partial(run, config=config) for config in configs[-1:]}


def _compare(
    section: Section, op: str, ways: Ways, given: Sequence[Any], exact: Sequence[Tensor], sizes: Sequence[Tensor],
    limit: int,
) -> None:  # fmt: skip
    for name, way in ways.items():
        poison(max(tensor.numel() for tensor in exact) * 2, section.device)
        shapes = [list(tensor.shape) for tensor in exact]
        try:
            found = way(*given)
        except Unfit as error:
            section.row(op=op, way=name, shapes=shapes, skipped=str(error))
            continue
        outputs = (
            [found]
            if isinstance(found, Tensor)
            else [t for part in found for t in ([part] if isinstance(part, Tensor) else part)]
        )
        ratios = [bound_ratio(*each) for each in zip(outputs, exact, sizes, strict=True)]
        dtype = str(outputs[0].dtype)
        section.row(op=op, way=name, shapes=shapes, dtype=dtype, bound_ratio=max(ratios), ok=max(ratios) < limit)


if __name__ == "__main__":
    main()
