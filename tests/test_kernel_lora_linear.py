"""A linear map and a low-rank pair beside it in one product: interpreted, against float64; compiled ahead of time.

Inputs lie within NaN and outputs start as NaN, so reading out of bounds and leaving an element unwritten both show.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from zoo.hopper import pretend_hopper
from zoo.poisoned import bound_ratio, unwritten, within_nan

from lrcompile.kernel_tools.compiling import Usage, usages
from lrcompile.kernel_tools.launches import Config, config
from lrcompile.kernels.lora_linear import ops
from lrcompile.kernels.lora_linear.reference import lora_linear

pytest.importorskip("triton")
fused = pytest.importorskip("lrcompile.kernels.lora_linear.fused")
tma = pytest.importorskip("lrcompile.kernels.lora_linear.fused_tma")
gradients = pytest.importorskip("lrcompile.kernels.lora_linear.fused_gradients")

LIMIT = 4
"""Of max|y − y64| / (u·Σ|x||W|): the final rounding takes at most 1, float32 sums of such lengths stay under 3."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = ((1, 33, 1, 18), (5, 7, 3, 9), (40, 70, 20, 50), (33, 17, 100, 35))
"""Rows, in, rank, out: one row, rank 1, fewer than a block, more than a block, a rank of several steps."""
PRODUCTS = config(4, 2, BLOCK_T=16, BLOCK_N=32, BLOCK_K=16, GROUP=2)
GRADIENTS = config(4, 2, BLOCK_T=16, BLOCK_O=32, span=32)


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return within_nan(torch.randn(shape, dtype=dtype))


def summed(xs: list[Tensor], Ms: list[Tensor], bias: Tensor | None, config: Config = PRODUCTS) -> Tensor:
    y = unwritten(xs[0].shape[0], Ms[0].shape[1], dtype=xs[0].dtype)
    fused.launch(xs, Ms, bias, y, config)()
    return y


def differentiated(dy: Tensor, B: Tensor, S: Tensor, config: Config = GRADIENTS) -> tuple[Tensor, Tensor]:
    dS, dB = unwritten(*S.shape, dtype=S.dtype), unwritten(*B.shape, dtype=B.dtype)
    parts = unwritten(gradients.parts_needed([dy], [B], config))
    for launch in gradients.gradient_launches([dy], [B], [S], [dS], [dB], parts, config):
        launch()
    return dS, dB


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "inner", "rank", "out"), SHAPES)
def test_the_output_and_every_gradient_are_within_the_bound_of_float64(
    dtype: torch.dtype, rows: int, inner: int, rank: int, out: int
):
    x, W, bias = random(rows, inner, dtype=dtype), random(out, inner, dtype=dtype), random(out, dtype=dtype)
    A, B = random(rank, inner, dtype=dtype), random(out, rank, dtype=dtype)
    dy = random(rows, out, dtype=dtype)

    exact = {name: tensor.double().requires_grad_() for name, tensor in dict(x=x, W=W, A=A, B=B, bias=bias).items()}
    y = lora_linear(exact["x"], exact["W"], exact["bias"], exact["x"] @ exact["A"].t(), exact["B"])
    y.backward(dy.double())

    S = within_nan(x @ A.t())
    dS, dB = differentiated(dy, B, S)
    ours = {
        "y": summed([x, S], [W.t(), B.t()], bias),
        "x": summed([dy, within_nan(dS)], [W, A], None),
        "A": dS.t() @ x,
        "B": dB,
    }
    ax, aW, aA, aB, ady = (tensor.double().abs() for tensor in (x, W, A, B, dy))
    magnitude = {
        "y": ax @ aW.t() + ax @ aA.t() @ aB.t() + bias.double().abs(),
        "x": ady @ aW + ady @ aB @ aA,
        "A": (ady @ aB).t() @ ax,
        "B": ady.t() @ (ax @ aA.t()),
    }
    true = {"y": y.detach(), **{name: exact[name].grad for name in "xAB"}}
    ratios = {name: bound_ratio(ours[name], true[name], magnitude[name]) for name in ours}
    assert max(ratios.values()) < LIMIT, ratios


@pytest.mark.parametrize("config", [PRODUCTS, config(4, 2, BLOCK_T=32, BLOCK_N=16, BLOCK_K=32, GROUP=1)])
@pytest.mark.parametrize("products", [2, 3, 5])
def test_several_wide_products_of_any_storage_order_add_up_in_one_output(config: Config, products: int):
    rows, columns, inner = 35, 41, (37, 16, 5, 20, 11)[-products:]
    xs = [random(rows, k, dtype=torch.float32) for k in inner]
    Ms = [random(k, columns, dtype=torch.float32) for k in inner]
    xs[0], Ms[0] = within_nan(xs[0].t()).t(), within_nan(Ms[0].t()).t()
    y = summed(xs, Ms, None, config)
    exact = sum(x.double() @ M.double() for x, M in zip(xs, Ms, strict=True))
    magnitude = sum(x.double().abs() @ M.double().abs() for x, M in zip(xs, Ms, strict=True))
    assert isinstance(exact, Tensor)
    assert isinstance(magnitude, Tensor)
    assert bound_ratio(y, exact, magnitude) < LIMIT


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "inner", "rank", "columns"), [(1, 8, 1, 16), (37, 40, 5, 56), (33, 16, 50, 24)])
@pytest.mark.parametrize("turned", [True, False])
def test_hoppers_own_kernel_is_within_the_bound_of_float64(
    dtype: torch.dtype, rows: int, inner: int, rank: int, columns: int, turned: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tma, "processors", lambda device: 3)  # fewer than tiles: programs go on to a second
    x, s, bias = (random(*shape, dtype=dtype) for shape in ((rows, inner), (rows, rank), (columns,)))
    M, m = random(inner, columns, dtype=dtype), random(rank, columns, dtype=dtype)
    if turned:
        M, m = within_nan(M.t()).t(), within_nan(m.t()).t()
    y = unwritten(rows, columns, dtype=dtype)
    tma.launch((x, s), (M, m), bias, y, config(4, 2, BLOCK_T=16, BLOCK_N=32, BLOCK_K=16, GROUP=2))()
    exact = x.double() @ M.double() + s.double() @ m.double() + bias.double()
    ax, aM, as_, am = (tensor.double().abs() for tensor in (x, M, s, m))
    assert bound_ratio(y, exact, ax @ aM + as_ @ am + bias.double().abs()) < LIMIT


@pytest.mark.parametrize("span", [16, 64])
def test_the_two_gradients_add_up_whatever_the_span(span: int):
    dy, B, S = (random(*shape, dtype=torch.float32) for shape in ((50, 70), (70, 5), (50, 5)))
    dS, dB = differentiated(dy, B, S, config(4, 2, BLOCK_T=16, BLOCK_O=32, span=span))
    d, b, s = dy.double(), B.double(), S.double()
    assert bound_ratio(dS, d @ b, d.abs() @ b.abs()) < LIMIT
    assert bound_ratio(dB, d.t() @ s, d.t().abs() @ s.abs()) < LIMIT


@pytest.fixture
def as_on_hopper(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    return pretend_hopper(monkeypatch, ops)


def aligned_operands(rows: int = 40, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(torch.randn(shape).to(dtype) for shape in ((rows, 48), (64, 48), (rows, 8), (64, 8)))  # type: ignore[return-value]


def test_on_cuda_every_way_gives_the_sum_and_each_is_measured_once(as_on_hopper: list[object]):
    x, W, S, B = aligned_operands(rows=70)
    xs, Ms, bias = [x, S], [W.t(), B.t()], torch.randn(64).bfloat16()
    ways = ops.ways_to_sum(xs, Ms, bias)
    assert {name.split()[0] for name in ways} == {"aten", "pointers", "tma"}
    exact = lora_linear(x.double(), W.double(), bias.double(), S.double(), B.double())
    magnitude = lora_linear(*(tensor.double().abs() for tensor in (x, W, bias, S, B)))
    assert all(bound_ratio(way(xs, Ms, bias), exact, magnitude) < LIMIT for way in ways.values())
    for _ in range(2):
        assert bound_ratio(ops.fastest_sum_of_products(xs, Ms, bias), exact, magnitude) < LIMIT
    assert len(as_on_hopper) == len(ways)


def test_on_cuda_every_way_gives_both_gradients_and_each_is_measured_once(as_on_hopper: list[object]):
    dy, B, _, _ = aligned_operands()
    B, S = torch.randn(48, 8).bfloat16(), torch.randn(40, 8).bfloat16()
    ways = ops.ways_to_differentiate(dy, B, S)
    assert len(ways) > 2
    d, b, s = dy.double(), B.double(), S.double()
    for way in (*ways.values(), ops.fastest_factor_gradients, ops.fastest_factor_gradients):
        dS, dB = way(dy, B, S)
        assert bound_ratio(dS, d @ b, d.abs() @ b.abs()) < LIMIT
        assert bound_ratio(dB, d.t() @ s, d.t().abs() @ s.abs()) < LIMIT
    assert len(as_on_hopper) == len(ways)


@pytest.mark.parametrize(
    "change",
    [
        lambda xs, Ms: (xs[:1], Ms[:1]),
        lambda xs, Ms: (xs * 3, Ms * 3),
        lambda xs, Ms: ([xs[0], torch.randn(40, 300).bfloat16()], [Ms[0], torch.randn(300, 64).bfloat16()]),
        lambda xs, Ms: ([x.double() for x in xs], [M.double() for M in Ms]),
        lambda xs, Ms: ([xs[0], xs[1].float()], Ms),
        lambda xs, Ms: ([x[:0] for x in xs], Ms),
    ],
    ids=["one product", "six products", "rank 300", "float64", "two dtypes", "no rows"],
)
def test_what_the_kernel_does_not_take_stays_with_aten(as_on_hopper: list[object], change: Callable):
    x, W, S, B = aligned_operands()
    xs, Ms = change([x, S], [W.t(), B.t()])
    assert list(ops.ways_to_sum(xs, Ms, None)) == ["aten"]


@pytest.mark.parametrize("rank", [5, 129])
def test_gradients_of_a_rank_or_storage_that_does_not_pay_stay_with_aten(as_on_hopper: list[object], rank: int):
    dy, B, S = (torch.randn(shape).bfloat16() for shape in ((40, 48), (48, rank), (40, rank)))
    assert (len(ops.ways_to_differentiate(dy, B, S)) > 1) == (rank == 5)
    expanded = torch.ones((), dtype=torch.bfloat16).expand(40, 48)  # what sum().backward() sends
    assert list(ops.ways_to_differentiate(expanded, B, S)) == ["aten"]
    assert list(ops.ways_to_differentiate(dy.t().contiguous().t(), B, S)) == ["aten"]


def test_wide_factors_and_scales_act_as_if_cast_and_multiplied_before(as_on_hopper: list[object]):
    x, W, S, _ = aligned_operands()
    B, scale = torch.randn(W.shape[0], S.shape[1]), torch.tensor(0.7)
    narrow = (scale * B).bfloat16()
    for sums in (ops.sum_of_products, ops.fastest_sum_of_products):
        y = sums([x, S], [W.t(), B.t()], None, scale)
        torch.testing.assert_close(y, sums([x, S], [W.t(), narrow.t()], None), rtol=0, atol=0)
    dy = torch.randn(x.shape[0], W.shape[0]).bfloat16()
    for way in (ops.factor_gradients, ops.fastest_factor_gradients):
        dS, dB = way(dy, B, S, scale)
        expected, plain = way(dy, narrow, S)
        torch.testing.assert_close(dS, expected, rtol=0, atol=0)
        torch.testing.assert_close(dB, plain.float() * scale, rtol=0, atol=0)
    torch.testing.assert_close(
        ops.cast_product(S, B.t(), torch.float32), (S @ B.t().bfloat16()).float(), rtol=0, atol=0
    )


def test_stand_ins_have_the_shapes_and_dtypes_of_the_results():
    x, W, S, _ = aligned_operands()
    B, scale = torch.randn(W.shape[0], S.shape[1]), torch.tensor(0.7)
    dy = torch.randn(x.shape[0], W.shape[0]).bfloat16()
    kernels, checks = torch.ops.lrcompile_kernels, ("test_schema", "test_faketensor")
    torch.library.opcheck(kernels.sum_of_products, ([x, S], [W.t(), B.t()], None, scale), test_utils=checks)
    torch.library.opcheck(kernels.factor_gradients, (dy, B, S, scale), test_utils=checks)
    torch.library.opcheck(kernels.cast_product, (S, B.t(), torch.float32), test_utils=checks)


def test_a_cpu_never_meets_triton_and_cuda_has_its_own_kernel():
    x, W, S, B = aligned_operands()
    assert list(ops.ways_to_sum([x, S], [W.t(), B.t()], None)) == ["aten"]
    assert list(ops.ways_to_differentiate(x, torch.randn(48, 8).bfloat16(), S)) == ["aten"]
    for op in ("sum_of_products", "factor_gradients"):
        has = partial(torch._C._dispatch_has_kernel_for_dispatch_key, f"lrcompile_kernels::{op}")
        assert has("CUDA")
        assert not has("CPU")


SHARED = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory a program may have on an A100 and on an H100 or H200, by NVIDIA's tables."""
REGISTERS = {"sums": 40, "forward": 254, "": 255}
"""By the first words of a launch's name. 255 is what an instruction can name; sums live by having many threads."""


def hold(found: dict[str, Usage], capability: int) -> None:
    assert found
    for name, usage in found.items():
        limit = next(limit for start, limit in REGISTERS.items() if name.startswith(start))
        assert usage.stack == 0, f"{name} spills: {usage}"
        assert usage.registers <= limit, f"{name}: {usage}"
        assert usage.shared <= SHARED[capability], f"{name}: {usage}"
        multiplies_tiles = "float32" not in name and not name.startswith("sums") and "BLOCK_T=16" not in name
        assert usage.wgmma == (capability == 90 and multiplies_tiles), f"{name}: {usage}"


@pytest.mark.parametrize(("module", "every"), [("fused", 30), ("fused_tma", 20), ("fused_gradients", 25)])
def test_a_sample_of_configurations_compiles_without_spills(module: str, every: int):
    hold(usages(f"lrcompile.kernels.lora_linear.{module}", 90, every), 90)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "capability"),
    [("fused", 80), ("fused", 90), ("fused_gradients", 80), ("fused_gradients", 90), ("fused_tma", 90)],
)
def test_every_configuration_that_may_be_chosen_compiles_without_spills(module: str, capability: int):
    hold(usages(f"lrcompile.kernels.lora_linear.{module}", capability), capability)
