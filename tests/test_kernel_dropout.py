"""Dropout by seed: the op, and the Triton kernel that does it on a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrcompile.kernel_tools.compiling import usages
from lrcompile.kernel_tools.launches import Config, config
from lrcompile.kernels.dropout import mask
from lrcompile.kernels.dropout.ops import BACKWARD, FORWARD

fused = pytest.importorskip("lrcompile.kernels.dropout.fused", reason="needs Triton")
drop = torch.ops.lrcompile_kernels.drop
SMALL = config(4, 1, BLOCK=32)
SEED = torch.tensor(2**61 + 12345)


def launched(x: Tensor, seed: Tensor, p: float, blocks: Config = SMALL) -> Tensor:
    """x lies within NaN, and so does the output: what is read beyond x or not written shows."""
    room = torch.full((x.numel() + 256,), float("nan"), dtype=x.dtype)
    inner = room[64 : 64 + x.numel()].view(x.shape)
    inner.copy_(x)
    out = torch.full_like(room, float("nan"))
    y = out[64 : 64 + x.numel()].view(x.shape)
    fused.launch(inner, y, seed, p, blocks)()
    assert bool(out[:64].isnan().all())
    assert bool(out[64 + x.numel() :].isnan().all())
    return y


@pytest.mark.parametrize("dtype", fused.FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(1,), (31,), (129, 3), (37, 53)])
def test_elements_are_zero_or_scaled_and_rounded_once(dtype, shape):
    x = torch.randn(shape).to(dtype)
    y = launched(x, SEED, 0.3)
    scaled = (x.float() * torch.tensor(1 / 0.7)).to(dtype)
    assert bool(((y == 0) | (y == scaled)).all())


def test_the_mask_is_that_of_the_seed_in_every_dtype_and_at_every_call():
    drawn = [launched(torch.ones(37, 53, dtype=dtype), SEED, 0.3) != 0 for dtype in (*fused.FLOATS, torch.float32)]
    assert all(torch.equal(each, drawn[0]) for each in drawn)
    assert not torch.equal(launched(torch.ones(37, 53), SEED + 1, 0.3) != 0, drawn[0])
    assert not torch.equal(launched(torch.ones(37, 53), SEED + 2**32, 0.3) != 0, drawn[0])  # all 64 bits count


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_the_kernel_drops_with_its_probability_and_without_a_pattern(p):
    n = 20_000
    kept = (launched(torch.ones(n), SEED, p, fused.CONFIG) != 0).double()
    assert abs(kept.mean().item() - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5
    centred = kept - (1 - p)
    for apart in (1, 2, 512, 2048):  # neighbours, words of one counter, programs
        assert abs((centred * centred.roll(apart)).mean().item()) < 5 * p * (1 - p) / n**0.5


def test_a_larger_probability_drops_what_a_smaller_one_does():
    less, more = (launched(torch.ones(1000), SEED, p) == 0 for p in (0.2, 0.6))
    assert bool((more | ~less).all())


def test_no_dropout_changes_nothing():
    x = torch.randn(100)
    assert torch.equal(launched(x, SEED, 0.0), x)


@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernel_compiles_without_spills(capability):
    found = usages("lrcompile.kernels.dropout.fused", capability, every=2)
    assert len(found) == 5
    assert {name: use.stack for name, use in found.items() if use.stack} == {}
    assert max(use.registers for use in found.values()) <= 64


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    shape=st.lists(st.integers(0, 9), min_size=0, max_size=3).map(tuple),
    p=st.floats(0, 0.99),
    seed=st.integers(0, 2**62 - 1),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_the_op_is_the_product_with_the_mask_and_both_phases_are_alike(shape, p, seed, dtype):
    x = torch.randn(shape).to(dtype)
    y = drop(x, torch.tensor(seed), p, FORWARD)
    assert torch.equal(y, x * mask(x, p, seed))
    assert torch.equal(drop(x, torch.tensor(seed), p, BACKWARD), y)


def test_strides_do_not_matter_and_the_input_is_left_alone():
    x = torch.randn(8, 5).t()
    before = x.clone()
    assert torch.equal(drop(x, SEED, 0.4, FORWARD), drop(x.contiguous(), SEED, 0.4, FORWARD))
    assert torch.equal(x, before)


def test_the_users_generator_is_left_alone():
    state = torch.get_rng_state()
    drop(torch.randn(3, generator=torch.Generator().manual_seed(0)), SEED, 0.4, FORWARD)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5])
def test_another_probability_is_refused(p):
    with pytest.raises(RuntimeError, match="expected 0 <= p < 1"):
        drop(torch.ones(3), SEED, p, FORWARD)


def test_the_op_keeps_its_contract():
    for test in ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"):
        torch.library.opcheck(drop, (torch.randn(5, 3), SEED, 0.4, FORWARD), test_utils=test)
