"""The model of an NF4 product's cost: bytes as stored, no path faster than its device, the order of paths by rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrcompile.kernels.nf4_dequant import BLOCK_SIZES, quantize_nf4
from lrcompile.kernels.nf4_linear.cost import H200, MOST_ROWS, Device, best_path, cost, paths, stored_bytes

LLAMA = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
"""Out and in of Llama-3-8B's maps."""


@settings(deadline=None, max_examples=20, derandomize=True)
@given(n=st.integers(1, 900), k=st.integers(1, 90), block_size=st.sampled_from(BLOCK_SIZES), double=st.booleans())
def test_the_bytes_of_a_weight_are_those_it_is_stored_in(n, k, block_size, double):
    nf4 = quantize_nf4(torch.randn(n, k), block_size, double)
    held = sum(tensor.nbytes for tensor in nf4[:3] if tensor is not None)
    assert held - 0.5 <= stored_bytes(n * k, block_size, double) <= held


def test_bytes_a_weight_are_the_formats():
    assert stored_bytes(1 << 24, 64, False) / (1 << 24) == 0.5625
    assert stored_bytes(1 << 24, 64, True) / (1 << 24) == pytest.approx(0.5159, abs=1e-4)


@pytest.mark.parametrize("rows", [1, 7, 16, 17, 64, 100, 256, 300, 512])
@pytest.mark.parametrize(("n", "k"), LLAMA)
def test_no_path_is_predicted_faster_than_memory_or_tensor_cores_allow(n, k, rows):
    for path in paths(rows, n, k, torch.bfloat16, 64, False):
        seconds = sum(step.seconds() for step in cost(path, rows, n, k))
        assert seconds > stored_bytes(n * k, 64, True) / H200.bandwidth
        assert seconds > 2 * rows * n * k / H200.flops
        assert sum(step.flops for step in cost(path, rows, n, k)) >= 2 * rows * n * k


@pytest.mark.parametrize(("n", "k"), LLAMA)
def test_with_more_rows_kernels_follow_each_other_and_dequantizing_comes_last(n, k):
    order = ["gemv", "skinny", "tiled", "dequantize"]
    best = [order.index(best_path(rows, n, k)) for rows in (1, 4, 16, 17, 32, 64, 513, 2048, 8192)]
    assert best == sorted(best)
    assert best[:3] == [0, 0, 0]
    assert best[-3:] == [3, 3, 3]


def test_transposed_products_have_no_path_that_scales_afterwards():
    assert paths(8, 4096, 4096, torch.bfloat16, 64, True) == ["tiled", "dequantize"]
    assert best_path(8, 4096, 4096, transposed=True) == "tiled"


@pytest.mark.parametrize(
    ("rows", "n", "k", "dtype", "transposed"),
    [
        (MOST_ROWS + 1, 4096, 4096, torch.bfloat16, False), (8, 4096, 4097, torch.bfloat16, False),
        (8, 4097, 4096, torch.bfloat16, True), (8, 4096, 4096, torch.float32, False), (0, 8, 32, torch.float16, False),
        (8, 1 << 17, 1 << 16, torch.bfloat16, False),
    ],
)  # fmt: skip
def test_what_no_kernel_takes_is_dequantized(rows, n, k, dtype, transposed):
    assert paths(rows, n, k, dtype, 64, transposed) == ["dequantize"]
    assert best_path(rows, n, k, dtype, 64, transposed) == "dequantize"


def test_a_device_that_issues_little_dequantizes_sooner():
    slow = Device(H200.bandwidth, H200.flops, H200.instructions / 16, H200.launch)
    assert best_path(512, 14336, 4096) != "dequantize"
    assert best_path(512, 14336, 4096, device=slow) == "dequantize"


def test_an_unknown_path_is_refused():
    with pytest.raises(ValueError, match="expected gemv, skinny, tiled or dequantize"):
        cost("cublas", 1, 32, 32)
