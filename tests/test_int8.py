"""Affine groups: what they lose, what they take, and that stochastic rounding loses nothing on average."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lrcompile
from lrcompile.int8.groups import dequantize_groups, empty_groups, quantize_groups
from lrcompile.int8.modules import is_int8, plain_weights

BITS = pytest.mark.parametrize("bits", [4, 8])


@settings(deadline=None, max_examples=25, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 40), st.sampled_from([2, 6, 16, 256]), st.sampled_from([4, 8]), st.booleans())
def test_a_value_is_off_by_half_a_step_at_most_or_by_less_than_one_when_rounded_at_random(
    rows, columns, group, bits, stochastic
):
    values = torch.randn(rows, columns) + 3
    generator = torch.Generator().manual_seed(0) if stochastic else None
    held = quantize_groups(values, bits, group, generator)
    back = dequantize_groups(held, values.shape, bits, torch.float32)
    step = held.scale.expand(-1, group).flatten()[: values.numel()].reshape(values.shape)
    assert ((back - values).abs() <= step * (1.0 if stochastic else 0.5) + 1e-5).all()


@BITS
def test_a_groups_least_and_largest_value_stay_also_where_all_are_of_one_sign(bits):
    values = torch.rand(4, 64) + 5
    back = dequantize_groups(quantize_groups(values, bits, 64), values.shape, bits, torch.float32)
    torch.testing.assert_close(back.amin(1), values.amin(1), rtol=0, atol=0)
    torch.testing.assert_close(back.amax(1), values.amax(1), rtol=2e-7, atol=0)


@BITS
def test_equal_values_and_an_identity_come_back_as_they_are(bits):
    for values in (torch.full((3, 7), 0.3), torch.zeros(5), torch.eye(6)):
        back = dequantize_groups(quantize_groups(values, bits, 8), values.shape, bits, torch.float32)
        torch.testing.assert_close(back, values, rtol=0, atol=1e-7)


def test_rounding_at_random_is_right_on_average():
    values = torch.randn(64, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    draws = torch.stack(
        [dequantize_groups(quantize_groups(values, 8, 64, generator), (64,), 8, torch.float64) for _ in range(4000)]
    )
    step = float(quantize_groups(values, 8, 64).scale)
    assert (draws.mean(0) - values).abs().max() < 5 * step / 2 / 4000**0.5 + 1e-6  # five standard errors, at most
    assert draws.std(0).max() > step / 3


def test_rounding_the_same_codes_again_and_again_does_not_let_them_drift():
    values = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    first = now = dequantize_groups(quantize_groups(values, 8, 64), values.shape, 8, torch.float32)
    for _ in range(500):
        now = dequantize_groups(quantize_groups(now, 8, 64, generator), values.shape, 8, torch.float32)
    moved = (now - first).abs() > 1e-5
    assert moved.float().mean() < 0.05
    assert (now.amax(1) - first.amax(1)).abs().max() <= 1e-5


@pytest.mark.parametrize(("numbers", "bits", "expected"), [(4096 * 4096, 8, 8.25), (4096 * 1024, 4, 4.25)])
def test_the_bits_of_a_value(numbers, bits, expected):
    held = empty_groups(numbers, bits, 256, torch.device("meta"))
    assert sum(t.nbytes for t in held) * 8 / numbers == expected


@BITS
def test_what_is_announced_is_what_comes(bits):
    held = quantize_groups(torch.randn(5, 13), bits, 16)
    announced = empty_groups(65, bits, 16)
    assert [(t.shape, t.dtype) for t in held] == [(t.shape, t.dtype) for t in announced]


# --- the class a module is given --------------------------------------------------------------------------------------


def hosted(dtype: torch.dtype = torch.float32) -> Any:
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 10)).to(dtype)
    return lrcompile.apply(model, lrcompile.spec("q-galore", rank=4, group_size=16, seed=0))


def test_a_module_keeps_its_class_its_bias_and_says_what_it_is():
    model = hosted()
    assert isinstance(model[0], nn.Linear)
    assert "weight" not in dict(model[0].named_parameters(recurse=False))
    assert "int8" in repr(model)
    x = torch.randn(3, 20)
    torch.testing.assert_close(model[0](x), x @ model[0].weight.t() + model[0].bias)


def test_a_cast_of_the_model_casts_what_the_weight_answers_in_and_no_code():
    model = hosted()
    exact = model[0].weight.clone()
    model.bfloat16()
    assert model[0].weight.dtype == torch.bfloat16
    assert torch.equal(model[0].weight, exact.bfloat16())
    model.float()
    assert torch.equal(model[0].weight, exact)


def test_copies_and_pickles_compute_the_same():
    model = hosted()
    x = torch.randn(3, 20)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), model(x))
        assert is_int8(other[0])


def test_plain_weights_are_parameters_for_a_while():
    model = hosted()
    x = torch.randn(3, 20)
    expected = model(x)
    with plain_weights(model):
        assert list(dict(model[0].named_parameters(recurse=False))) == ["weight", "bias"]
        assert torch.equal(model(x), expected)
    assert is_int8(model[0])
    assert torch.equal(model(x), expected)


def test_another_adapter_on_such_a_weight_is_refused_with_the_reason():
    with pytest.raises(lrcompile.TargetError, match="holds its weight in INT8"):
        lrcompile.apply(hosted(), lrcompile.spec("lora", rank=2, targets=["0"]), name="other")


@pytest.mark.parametrize("method", ["lora", "dora", "galore"])
def test_it_cannot_take_a_weight_that_another_adapter_reads(method):
    model = lrcompile.apply(nn.Sequential(nn.Linear(20, 11)), lrcompile.spec(method, rank=2, targets=["0"]), name="old")
    x = torch.randn(3, 20)
    expected, bits = model(x), {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(lrcompile.AdapterError, match=rf"q-galore holds the weight itself.*'old' \({method}\) is at 0"):
        lrcompile.apply(model, lrcompile.spec("q-galore", rank=2, targets=["0"], group_size=20), name="new")
    assert torch.equal(model(x), expected)
    assert all(torch.equal(value, bits[name]) for name, value in model.state_dict().items())
