"""The gradient of a gain on outputs by one op, against what autograd makes of the plain formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrcompile.kernels.gain import ops as ops  # registers the op
from lrcompile.kernels.gain.reference import gained

gain_gradient = torch.ops.lrcompile_kernels.gain_gradient
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@settings(deadline=None, max_examples=120, derandomize=True)
@given(
    lead=st.lists(st.integers(0, 5), max_size=3).map(tuple),
    out=st.integers(1, 67),
    dtype=st.sampled_from(DTYPES),
    of_gain=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    divided=st.booleans(),
    bias=st.booleans(),
    turned=st.booleans(),
)
def test_it_is_within_rounding_of_float64(lead, out, dtype, of_gain, divided, bias, turned):
    dy, y = torch.randn(*lead, out).to(dtype), torch.randn(*lead, out).to(dtype)
    if turned and len(lead) > 1:
        dy = dy.transpose(0, 1).contiguous().transpose(0, 1)
    n = (torch.rand(out) + 0.5).to(of_gain) if divided else None
    c = torch.randn(out).to(dtype) if bias else None
    true = differentiated(dy, y, n, c)
    size = differentiated(dy.abs(), y.abs(), n, None if c is None else -c.abs())
    found = gain_gradient(dy, y, n, c, of_gain)
    assert (found.shape, found.dtype) == ((out,), of_gain)
    wide = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    bound = torch.finfo(of_gain).eps * true.abs() + (4 + dy.numel() // out) * wide * size
    assert bool(((found.double() - true).abs() <= bound).all())


def differentiated(dy: Tensor, y: Tensor, n: Tensor | None, c: Tensor | None) -> Tensor:
    m = torch.ones(y.shape[-1], dtype=torch.float64, requires_grad=True)
    exact = [None if each is None else each.double() for each in (n, c)]
    return torch.autograd.grad(gained(y.double(), m, *exact), m, dy.double())[0]


def test_a_stand_in_has_the_shape_and_dtype_of_the_result():
    dy, y = torch.randn(3, 2, 5).bfloat16(), torch.randn(3, 2, 5).bfloat16()
    n, c = torch.rand(5), torch.randn(5).bfloat16()
    for vectors in ((n, c), (n, None), (None, c), (None, None)):
        torch.library.opcheck(
            gain_gradient, (dy, y, *vectors, torch.float32), test_utils=("test_schema", "test_faketensor")
        )


def test_shapes_that_do_not_fit_are_refused():
    y, n = torch.randn(3, 5), torch.ones(5)
    for wrong in ((y[:2], y, n, None), (y, y, n[:4], None), (y, y, None, n[:4]), (y.double(), y, n, None)):
        with pytest.raises(RuntimeError, match="expected dy and y"):
            gain_gradient(*wrong, torch.float32)
