"""The gradients of a gain on outputs by one op, against what autograd makes of the plain formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrcompile.kernels.gain import ops as ops  # registers the op
from lrcompile.kernels.gain.reference import gained

gain_gradients = torch.ops.lrcompile_kernels.gain_gradients
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
    m = torch.randn(out).to(of_gain)
    n = (torch.rand(out) + 0.5).to(of_gain) if divided else None
    c = torch.randn(out).to(dtype) if bias else None
    exact = differentiated(dy, y, m, n, c)
    sizes = differentiated(dy.abs(), y.abs(), m.abs(), n, None if c is None else -c.abs())
    found = gain_gradients(dy, y, m, n, c)
    wide = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    for name, ours, like, true, size, terms in zip(
        ("dy", "dm"), found, (y, m), exact, sizes, (1, dy.numel() // out), strict=True
    ):
        assert (ours.shape, ours.dtype, ours.is_contiguous()) == (like.shape, like.dtype, True), name
        bound = torch.finfo(like.dtype).eps * true.abs() + (4 + terms) * wide * size + torch.finfo(like.dtype).tiny
        assert bool(((ours.double() - true).abs() <= bound).all()), name


def differentiated(dy: Tensor, y: Tensor, m: Tensor, n: Tensor | None, c: Tensor | None) -> tuple[Tensor, ...]:
    y, m = (each.double().requires_grad_() for each in (y, m))
    exact = [None if each is None else each.double() for each in (n, c)]
    return torch.autograd.grad(gained(y, m, *exact), (y, m), dy.double())


def test_a_stand_in_has_the_shapes_and_dtypes_of_the_results():
    dy, y = torch.randn(3, 2, 5).bfloat16(), torch.randn(3, 2, 5).bfloat16()
    m, n, c = torch.rand(5), torch.rand(5), torch.randn(5).bfloat16()
    for vectors in ((n, c), (n, None), (None, c), (None, None)):
        torch.library.opcheck(gain_gradients, (dy, y, m, *vectors), test_utils=("test_schema", "test_faketensor"))


def test_shapes_that_do_not_fit_are_refused():
    y, n = torch.randn(3, 5), torch.ones(5)
    for wrong in (
        (y[:2], y, n, n, None), (y, y, n[:4], n, None), (y, y, n, n[:4], None), (y, y, n, None, n[:4]),
        (y.double(), y, n, n, None),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="expected dy and y"):
            gain_gradients(*wrong)
