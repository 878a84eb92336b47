"""A factor between two diagonals: the op and the gradients of the diagonals, against the plain product."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrcompile.kernels.scaled_factor import ops
from lrcompile.kernels.scaled_factor.reference import scaled_factor

OPS = torch.ops.lrcompile_kernels
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
SIZES = ((1, 1), (1, 9), (7, 1), (13, 5), (33, 66))
GIVEN = ("rows", "columns", "both")
SCALE = torch.tensor(0.7)


def drawn(n: int, m: int, dtypes: tuple[torch.dtype, ...], given: str = "both") -> tuple[Tensor, Any, Any]:
    sizes = ((n, m), (n,), (m,))
    factor, rows, columns = (torch.randn(size).to(dtype) for size, dtype in zip(sizes, dtypes, strict=True))
    return factor, None if given == "columns" else rows, None if given == "rows" else columns


def eps(*tensors: Tensor | None) -> float:
    return max(torch.finfo(each.dtype).eps for each in tensors if each is not None)


@pytest.mark.parametrize("scale", [None, SCALE], ids=["", "scaled"])
@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize(("n", "m"), SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_product_and_every_gradient_are_within_rounding_of_float64(dtype, n, m, given, scale):
    factor, rows, columns = drawn(n, m, (dtype,) * 3, given)
    gradient = torch.randn(n, m).to(dtype)
    exact: list[Any] = [None if each is None else each.double().requires_grad_() for each in (factor, rows, columns)]
    product = scaled_factor(exact[0], exact[1], exact[2], scale)
    wanted = [each for each in exact[1:] if each is not None]
    true = torch.autograd.grad(product, wanted, gradient.double())

    single = min(eps(factor), torch.finfo(torch.float32).eps)
    found = OPS.scaled_factor(factor, rows, columns, scale, ops.FORWARD)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), product.detach(), rtol=max(eps(factor) / 2, 4 * single) + single, atol=0)
    magnitudes: list[Any] = [None if each is None else each.detach().abs().requires_grad_() for each in exact]
    sizes = torch.autograd.grad(
        scaled_factor(magnitudes[0], magnitudes[1], magnitudes[2], scale),
        [each for each in magnitudes[1:] if each is not None],
        gradient.double().abs(),
    )
    gradients = OPS.diagonal_gradients(gradient, factor, rows, columns, scale)
    assert len(gradients) == len(true)
    for ours, each, size in zip(gradients, true, sizes, strict=True):
        bound = eps(factor) * each.abs() + (4 + max(n, m) ** 0.5) * single * size
        assert ours.dtype == dtype
        assert bool(((ours.double() - each).abs() <= bound).all())


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    n=st.integers(0, 6),
    m=st.integers(0, 6),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 3),
    given=st.sampled_from(GIVEN),
    upright=st.booleans(),
)
def test_the_product_has_the_widest_dtype_and_gradients_the_shape_of_their_diagonals(n, m, dtypes, given, upright):
    factor, rows, columns = drawn(n, m, dtypes, given)
    if upright:
        rows, columns = (None if rows is None else rows[:, None]), (None if columns is None else columns[None])
    product = OPS.scaled_factor(factor, rows, columns, SCALE, ops.BACKWARD)
    widest = max((each.dtype for each in (factor, rows, columns) if each is not None), key=lambda d: d.itemsize)
    assert (product.shape, product.dtype) == (factor.shape, widest)
    gradients = OPS.diagonal_gradients(product, factor, rows, columns, SCALE)
    for ours, diagonal in zip(gradients, [each for each in (rows, columns) if each is not None], strict=True):
        assert (ours.shape, ours.dtype) == (diagonal.shape, diagonal.dtype)


def test_16_bits_are_rounded_once():
    factor, rows, columns = drawn(40, 30, (torch.bfloat16,) * 3)
    found = OPS.scaled_factor(factor, rows, columns, None, ops.FORWARD)
    exact = scaled_factor(factor.double(), rows, columns, None)
    assert bool(((found.double() - exact).abs() <= exact.abs() * (2**-8 + 4 * 2**-24)).all())


@pytest.mark.parametrize("given", GIVEN)
def test_stand_ins_have_the_shapes_and_dtypes_of_the_results(given):
    factor, rows, columns = drawn(5, 3, (torch.bfloat16, torch.float32, torch.bfloat16), given)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPS.scaled_factor, (factor, rows, columns, SCALE, ops.FORWARD), test_utils=checks)
    torch.library.opcheck(OPS.diagonal_gradients, (torch.randn(5, 3), factor, rows, columns, None), test_utils=checks)


@pytest.mark.parametrize("wrong", [(None, None), (torch.ones(3), None), (None, torch.ones(5)), (torch.ones(()), None)])
def test_diagonals_of_another_length_and_none_at_all_are_refused(wrong):
    factor = torch.ones(5, 3)
    for call in (
        lambda: OPS.scaled_factor(factor, *wrong, None, ops.FORWARD),
        lambda: OPS.diagonal_gradients(factor, factor, *wrong, None),
    ):
        with pytest.raises(RuntimeError, match="expected a matrix, and a number for each of its rows"):
            call()
