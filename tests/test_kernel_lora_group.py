"""Maps that share their input, each with a low-rank pair beside it, of ragged widths and ranks: one launch for all.

Interpreted, against float64, within NaN; compiled ahead of time.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from zoo.hopper import pretend_hopper
from zoo.poisoned import bound_ratio, unwritten, within_nan

from lrcompile.kernel_tools.compiling import usages
from lrcompile.kernel_tools.launches import config
from lrcompile.kernel_tools.tuning import Way
from lrcompile.kernels.lora_group import ops
from lrcompile.kernels.lora_group.reference import lora_group
from lrcompile.kernels.lora_linear import ops as of_one

pytest.importorskip("triton")
fused = pytest.importorskip("lrcompile.kernels.lora_group.fused")
gradients = pytest.importorskip("lrcompile.kernels.lora_linear.fused_gradients")

LIMIT = 4
"""Of max|y − y64| / (u·Σ|x||W|): the roundings of y and of the wide product take 2, float32 sums the rest."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GROUPS = (((1, 18), (3, 1)), ((50, 33, 7), (20, 5, 16)), ((35,), (100,)), ((9,) * 8, (1, 2, 3, 4, 5, 6, 7, 8)))
"""Widths and ranks: one column, and rank 1; ragged; one map, its rank of several steps; as many as a launch takes."""


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return within_nan(torch.randn(shape, dtype=dtype))


def columns_of_one(rows: int, ranks: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    return list(random(rows, sum(ranks), dtype=dtype).split(ranks, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outs", "ranks"), GROUPS)
@pytest.mark.parametrize("rows", [1, 37])
def test_every_output_and_gradient_is_within_the_bound_of_float64(
    dtype: torch.dtype, outs: tuple[int, ...], ranks: tuple[int, ...], rows: int
):
    inner = 13
    x, Ss = random(rows, inner, dtype=dtype), columns_of_one(rows, ranks, dtype)
    Ws = [random(out, inner, dtype=dtype) for out in outs]
    Bs = [random(out, rank, dtype=dtype) for out, rank in zip(outs, ranks, strict=True)]
    biases = [random(out, dtype=dtype) if i % 2 else None for i, out in enumerate(outs)]
    dys = [random(rows, out, dtype=dtype) for out in outs]

    exact_Ss, exact_Bs = ([tensor.double().requires_grad_() for tensor in tensors] for tensors in (Ss, Bs))
    wide = [None if bias is None else bias.double() for bias in biases]
    true_ys = lora_group(x.double(), [W.double() for W in Ws], wide, exact_Ss, exact_Bs)
    torch.autograd.backward(true_ys, [dy.double() for dy in dys])

    ys = [torch.nn.functional.linear(x, W, bias) for W, bias in zip(Ws, biases, strict=True)]
    fused.expand(ys, Ss, Bs, config(4, 2, BLOCK_T=16, BLOCK_O=32))()
    dSs = [unwritten(*S.shape, dtype=dtype) for S in Ss]
    dBs = [unwritten(*B.shape, dtype=dtype) for B in Bs]
    some = config(4, 2, BLOCK_T=16, BLOCK_O=32, span=32)
    parts = unwritten(gradients.parts_needed(dys, Bs, some))
    for launch in gradients.gradient_launches(dys, Bs, Ss, dSs, dBs, parts, some):
        launch()

    absolute = partial(map, lambda tensor: None if tensor is None else tensor.double().abs())
    magnitudes = lora_group(x.double().abs(), *(list(absolute(tensors)) for tensors in (Ws, biases, Ss, Bs)))
    ratios = {}
    for i, (dy, B, S) in enumerate(zip(dys, Bs, Ss, strict=True)):
        d, b, s = dy.double().abs(), B.double().abs(), S.double().abs()
        ratios[f"y{i}"] = bound_ratio(ys[i], true_ys[i].detach(), magnitudes[i])
        ratios[f"S{i}"] = bound_ratio(dSs[i], exact_Ss[i].grad, d @ b)
        ratios[f"B{i}"] = bound_ratio(dBs[i], exact_Bs[i].grad, d.t() @ s)
    assert max(ratios.values()) < LIMIT, ratios


@pytest.fixture
def as_on_hopper(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    return pretend_hopper(monkeypatch, ops, of_one)


def operands(ranks: tuple[int, ...] = (16, 5)) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    x, Ws = torch.randn(40, 48).bfloat16(), [torch.randn(out, 48).bfloat16() for out in (64, 32)]
    Ss = list(torch.randn(40, sum(ranks)).bfloat16().split(ranks, 1))
    Bs = [torch.randn(W.shape[0], rank).bfloat16() for W, rank in zip(Ws, ranks, strict=True)]
    return x, Ws, Ss, Bs


def test_on_cuda_every_way_gives_the_products_of_the_group(as_on_hopper: list[object]):
    x, Ws, Ss, Bs = operands()
    biases = [None, torch.randn(32).bfloat16()]
    ways = ops.ways_to_multiply(x, Ws, biases, Ss, Bs)
    assert next(iter(ways)) == "each"
    assert len(ways) == 3
    exact = torch.ops.lrcompile_kernels.group_products(x, Ws, biases, Ss, Bs, [None] * len(Ws))
    chosen: Way = partial(ops.fastest_group_products, scales=[None] * len(Ws))
    for way in (*ways.values(), chosen):
        for y, expected in zip(way(x, Ws, biases, Ss, Bs), exact, strict=True):
            # Two roundings of the result on either side, of values below 2⁶.
            torch.testing.assert_close(y, expected, rtol=2**-6, atol=2**-3)
    assert len(as_on_hopper) > len(ways)  # those of each map by itself as well


def test_on_cuda_every_way_gives_the_gradients_of_the_group(as_on_hopper: list[object]):
    _, _, Ss, Bs = operands()
    dys = [torch.randn(40, out).bfloat16() for out in (64, 32)]
    ways = ops.ways_to_differentiate(dys, Bs, Ss)
    assert next(iter(ways)) == "each"
    assert len(ways) > 1
    exact = torch.ops.lrcompile_kernels.group_gradients(dys, Bs, Ss, [None] * len(dys))
    chosen: Way = partial(ops.fastest_group_gradients, scales=[None] * len(dys))
    for way in (*ways.values(), chosen):
        for ours, theirs in zip(way(dys, Bs, Ss), exact, strict=True):
            for gradient, expected in zip(ours, theirs, strict=True):
                torch.testing.assert_close(gradient, expected, rtol=2**-6, atol=2**-3)


SCALED = ("CompositeExplicitAutograd", "CUDA")


@pytest.mark.parametrize("key", SCALED)
def test_wide_factors_and_scales_act_as_if_cast_and_multiplied_before(as_on_hopper: list[object], key: str):
    products = {SCALED[0]: ops.group_products, SCALED[1]: ops.fastest_group_products}[key]
    gradients = {SCALED[0]: ops.group_gradients, SCALED[1]: ops.fastest_group_gradients}[key]
    x, Ws, Ss, _ = operands()
    Bs = [torch.randn(W.shape[0], S.shape[1]) for W, S in zip(Ws, Ss, strict=True)]
    scales, nothing = [torch.tensor(0.7), None], [None, None]
    narrow = [(0.7 * Bs[0]).bfloat16(), Bs[1].bfloat16()]
    for y, expected in zip(
        products(x, Ws, nothing, Ss, Bs, scales), products(x, Ws, nothing, Ss, narrow, nothing), strict=True
    ):
        torch.testing.assert_close(y, expected, rtol=0, atol=0)
    dys = [torch.randn(40, out).bfloat16() for out in (64, 32)]
    dSs, dBs = gradients(dys, Bs, Ss, scales)
    same_dSs, plain_dBs = gradients(dys, narrow, Ss, nothing)
    for dS, expected in zip(dSs, same_dSs, strict=True):
        torch.testing.assert_close(dS, expected, rtol=0, atol=0)
    assert [dB.dtype for dB in dBs] == [torch.float32] * 2
    torch.testing.assert_close(dBs[0], plain_dBs[0].float() * 0.7, rtol=0, atol=0)
    torch.testing.assert_close(dBs[1], plain_dBs[1].float(), rtol=0, atol=0)


def test_stand_ins_have_the_shapes_and_dtypes_of_the_results():
    x, Ws, Ss, _ = operands()
    Bs = [torch.randn(W.shape[0], S.shape[1]) for W, S in zip(Ws, Ss, strict=True)]
    scales, dys = [torch.tensor(0.7), None], [torch.randn(40, out).bfloat16() for out in (64, 32)]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.lrcompile_kernels.group_products, (x, Ws, [None] * 2, Ss, Bs, scales), test_utils=checks
    )
    torch.library.opcheck(torch.ops.lrcompile_kernels.group_gradients, (dys, Bs, Ss, scales), test_utils=checks)


def test_a_group_the_kernels_do_not_take_goes_map_by_map(as_on_hopper: list[object]):
    x, Ws, Ss, Bs = operands((300, 5))
    nothing = [None, None]
    assert list(ops.ways_to_multiply(x, Ws, nothing, Ss, Bs)) == ["each"]
    x, Ws, Ss, Bs = operands()
    assert list(ops.ways_to_multiply(x, Ws, nothing, [S.t().contiguous().t() for S in Ss], Bs)) == ["each"]
    assert list(ops.ways_to_multiply(x, Ws * 5, nothing * 5, Ss * 5, Bs * 5)) == ["each"]
    assert list(ops.ways_to_multiply(x[:0], Ws, nothing, [S[:0] for S in Ss], Bs)) == ["each"]
    dys = [torch.randn(40, out).bfloat16() for out in (64, 32)]
    assert list(ops.ways_to_differentiate(dys * 5, Bs * 5, Ss * 5)) == ["each"]
    assert list(ops.ways_to_differentiate([dys[0], dys[1].float()], Bs, Ss)) == ["each"]


def test_a_cpu_never_meets_triton_and_cuda_has_its_own_kernel():
    x, Ws, Ss, Bs = operands()
    assert list(ops.ways_to_multiply(x, Ws, [None, None], Ss, Bs)) == ["each"]
    for op in ("group_products", "group_gradients"):
        has = partial(torch._C._dispatch_has_kernel_for_dispatch_key, f"lrcompile_kernels::{op}")
        assert has("CUDA")
        assert not has("CPU")


@pytest.mark.parametrize(
    ("capability", "every"),
    [(90, 5), pytest.param(80, 1, marks=pytest.mark.slow), pytest.param(90, 1, marks=pytest.mark.slow)],
)
def test_configurations_that_may_be_chosen_compile_without_spills(capability: int, every: int):
    found = usages("lrcompile.kernels.lora_group.fused", capability, every)
    assert found
    assert {name: usage for name, usage in found.items() if usage.stack or usage.registers > 255} == {}
    assert all(usage.shared <= 64 * 1024 for usage in found.values())  # three programs fit wherever one does
