"""n = ‖W + s·BA‖ by row without the sum: a few rows of W at a time, and Triton interpreted, against float64.

Inputs lie within NaN and outputs start as NaN, so reading out of bounds and leaving an element unwritten both show.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from zoo.hopper import pretend_hopper
from zoo.poisoned import bound_ratio, flat_within_nan, unwritten, within_nan

from lrcompile.kernel_tools import parts
from lrcompile.kernel_tools.compiling import usages
from lrcompile.kernel_tools.launches import config
from lrcompile.kernels.dora_norm import ops, plain
from lrcompile.kernels.dora_norm.reference import dora_norm
from lrcompile.kernels.nf4_dequant import BLOCK_SIZES, Nf4, dequantize_nf4, quantize_nf4

pytest.importorskip("triton")
fused = pytest.importorskip("lrcompile.kernels.dora_norm.fused")

LIMIT = 4
"""Of |n² − n64²| / (u·(|W| + |s||B||A|)²): the squares' sums and the three terms' in float32."""
SMALL = config(4, 2, BLOCK_O=16, BLOCK_I=16)
SHAPES = ((1, 33, 1), (37, 70, 5), (16, 64, 16), (20, 17, 70))
"""Out, in, rank: one row, more than a block, whole blocks, a rank of two chunks that is larger than both."""


def _pair(out: int, inner: int, rank: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(rank, inner).to(dtype), torch.randn(out, rank).to(dtype), torch.tensor(-0.7)


def _held(n: Tensor, W: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> float:
    W, A, B, s = (tensor.double() for tensor in (W, A, B, scale))
    magnitude = (W.abs() + s.abs() * (B.abs() @ A.abs())).square().sum(1)
    return bound_ratio(n.square(), dora_norm(W, A, B, s).square(), magnitude)


def _stored(W: Tensor, columns: bool) -> Tensor:
    """The same values, rows or columns contiguous, within NaN."""
    return within_nan(W.t()).t() if columns else within_nan(W)


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("out", "inner", "rank"), SHAPES)
def test_the_norm_is_that_of_the_sum_a_few_lines_at_a_time(out, inner, rank, dtype, columns, monkeypatch):
    monkeypatch.setattr(plain, "PART", 64)
    W, (A, B, s) = torch.randn(out, inner).to(dtype), _pair(out, inner, rank)
    squares = W.to(torch.promote_types(dtype, torch.float32)).square().sum(1)
    for known in (None, squares):
        n = torch.ops.lrcompile_kernels.dora_norm(_stored(W, columns), A, B, s, known)
        assert n.dtype == torch.promote_types(dtype, torch.float32)
        assert _held(n, W, A, B, s) < LIMIT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize(("transposed", "double_quant"), [(False, True), (True, True), (True, False)])
def test_the_norm_of_an_nf4_weight_is_that_of_its_values(transposed, double_quant, block_size, dtype, monkeypatch):
    monkeypatch.setattr(plain, "PART", 64)
    out, inner = 37, 75
    W = torch.randn((inner, out) if transposed else (out, inner))
    nf4, (A, B, s) = quantize_nf4(W, block_size, double_quant), _pair(out, inner, 5)
    n = torch.ops.lrcompile_kernels.nf4_dora_norm(*nf4, A, B, s, None, block_size, transposed, dtype)
    values = dequantize_nf4(nf4, tuple(W.shape), block_size, torch.float64)
    assert n.dtype == dtype
    assert _held(n, values.t() if transposed else values, A, B, s) < LIMIT


def test_nothing_of_the_weights_size_is_formed():
    """The largest tensor of any operation is a part, not W and not BA."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and not func.is_view:
                largest = max(largest, result.numel())
            return result

    out, inner = 2048, 1024
    W, (A, B, s) = torch.randn(out, inner).bfloat16(), _pair(out, inner, 4)
    nf4 = quantize_nf4(W, 64, True)
    with Watch():
        ops.dora_norm(W, A, B, s, None)
        ops.nf4_dora_norm(*nf4, A, B, s, None, 64, False, torch.float32)
    assert largest <= plain.PART < out * inner


def _run(
    W: Tensor | Nf4, block_size: int, transposed: bool, A: Tensor, B: Tensor, s: Tensor, known: Tensor | None
) -> Tensor:
    n = unwritten(B.shape[0])
    A, B, known = flat_within_nan(A), flat_within_nan(B), None if known is None else flat_within_nan(known)
    for launch in fused.launches(W, block_size, transposed, A, B, s, known, n, SMALL):
        launch()
    return n


@pytest.mark.parametrize(("dtype", "columns"), [(torch.bfloat16, False), (torch.float16, True), (torch.float32, False)])
@pytest.mark.parametrize(("out", "inner", "rank"), SHAPES)
def test_the_kernels_norm_is_that_of_the_sum(out, inner, rank, dtype, columns, monkeypatch, nan_when_empty):
    monkeypatch.setattr(parts, "FEWEST_STEPS", 1)
    W, (A, B, s) = torch.randn(out, inner).to(dtype), _pair(out, inner, rank)
    for known in (None, W.float().square().sum(1)):
        assert _held(_run(_stored(W, columns), 0, False, A, B, s, known), W, A, B, s) < LIMIT


@pytest.mark.parametrize(
    ("block_size", "transposed", "double_quant"),
    [(32, False, True), (64, True, True), (128, False, False), (512, True, False), (4096, False, True)],
)
def test_the_kernels_norm_of_an_nf4_weight_is_that_of_its_values(block_size, transposed, double_quant):
    out, inner = 19, 37
    W = torch.randn((inner, out) if transposed else (out, inner))
    nf4, (A, B, s) = quantize_nf4(W, block_size, double_quant), _pair(out, inner, 5)
    stored = Nf4._make(None if tensor is None else flat_within_nan(tensor) for tensor in nf4)
    values = dequantize_nf4(nf4, tuple(W.shape), block_size, torch.float64)
    n = _run(stored, block_size, transposed, A, B, s, None)
    assert _held(n, values.t() if transposed else values, A, B, s) < LIMIT


def test_squares_that_are_known_come_back_as_they_were_where_the_pair_is_zero():
    """DoRA's magnitudes start as the norms, so that the map starts as the layer's to the bit."""
    W, (A, B, s) = torch.randn(37, 70).bfloat16(), _pair(37, 70, 5)
    squares = W.float().square().sum(1)
    # In float64 and rounded: torch's own float32 root is not always the nearest on a CPU, as a GPU's and Triton's is.
    assert torch.equal(_run(W, 0, False, A, torch.zeros_like(B), s, squares), squares.double().sqrt().float())
    assert torch.equal(ops.dora_norm(W, A, torch.zeros_like(B), s, squares), squares.sqrt())


@pytest.fixture
def as_on_hopper(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    return pretend_hopper(monkeypatch, ops)


def test_on_cuda_every_way_gives_the_norm_and_each_is_measured_once(as_on_hopper):
    W, (A, B, s) = torch.randn(37, 70).bfloat16(), _pair(37, 70, 5, torch.bfloat16)
    for _ in range(2):
        assert _held(ops.fastest_dora_norm(W, A, B, s, None), W, A, B, s) < LIMIT
    assert len(as_on_hopper) == 1 + len(fused.CONFIGS)
    nf4 = quantize_nf4(W, 64, True)
    values = dequantize_nf4(nf4, (37, 70), 64, torch.float64)
    for _ in range(2):
        n = ops.fastest_nf4_dora_norm(*Nf4._make(nf4), A, B, s, None, 64, False, torch.float32)
        assert _held(n, values, A, B, s) < LIMIT
    assert len(as_on_hopper) == 2 + len(fused.CONFIGS) + len(fused.NF4_CONFIGS)


def test_what_the_kernel_does_not_read_is_left_to_aten(as_on_hopper):
    W, (A, B, s) = torch.randn(7, 13, dtype=torch.float64), _pair(7, 13, 2)
    assert _held(ops.fastest_dora_norm(W, A, B, s, None), W, A, B, s) < LIMIT
    assert as_on_hopper == []


def test_a_cpu_never_meets_triton_and_cuda_has_its_own_kernel():
    assert list(ops.ways_to_norm(torch.randn(7, 13), torch.float32, torch.device("cpu"))) == ["aten"]
    for op in ("dora_norm", "nf4_dora_norm"):
        has = partial(torch._C._dispatch_has_kernel_for_dispatch_key, f"lrcompile_kernels::{op}")
        assert has("CUDA")
        assert not has("CPU")


def test_opcheck_finds_the_ops_and_their_fakes_in_agreement_and_their_flops_are_counted():
    W, (A, B, s) = torch.randn(7, 13), _pair(7, 13, 2)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (torch.ops.lrcompile_kernels.dora_norm, (W, A, B, s, None)),
        (
            torch.ops.lrcompile_kernels.nf4_dora_norm,
            (*quantize_nf4(W, 32, True), A, B, s, None, 32, False, torch.float32),
        ),
    ]
    for op, arguments in calls:
        torch.library.opcheck(op.default, arguments)
        with FlopCounterMode(display=False) as counter:
            op(*arguments)
        assert counter.get_total_flops() == 2 * (7 * 13 * 2 + 2 * 13 * 2 + 7 * 2 * 2)


@pytest.mark.parametrize(
    "change",
    [
        dict(A=torch.randn(2, 12)),
        dict(B=torch.randn(7, 3)),
        dict(scale=torch.ones(1)),
        dict(squares=torch.ones(6)),
    ],
)
def test_shapes_that_do_not_fit_each_other_are_refused(change):
    A, B, s = _pair(7, 13, 2)
    given = dict(W=torch.randn(7, 13), A=A, B=B, scale=s, squares=None) | change
    with pytest.raises(RuntimeError, match=r"dora_norm: .*expected W \[out, in\], A \[rank, in\]"):
        torch.ops.lrcompile_kernels.dora_norm(**given)


SHARED = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory a program may have on an A100 and on an H100 or H200, by NVIDIA's tables."""


def _afford(found: dict[str, Any], capability: int) -> None:
    assert found
    for name, usage in found.items():
        assert usage.stack == 0, f"{name} spills: {usage}"
        assert usage.shared <= SHARED[capability], f"{name}: {usage}"


def test_a_sample_of_configurations_compiles_without_spills():
    _afford(usages("lrcompile.kernels.dora_norm.fused", 90, every=13), 90)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_every_configuration_that_may_be_chosen_compiles_without_spills(capability):
    _afford(usages("lrcompile.kernels.dora_norm.fused", capability), capability)
