"""rounded_for_outputs: NF4 codes for what a layer puts out; no result is further from its target than it was."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrcompile.kernels.nf4_dequant import CODEBOOK, Nf4, dequantize_nf4, pack, quantize_nf4, unpack
from lrcompile.nf4.modules import Layout
from lrcompile.nf4.rounding import rounded_for_outputs


def layout(out: int, inside: int, block: int = 64, transposed: bool = False) -> Layout:
    return Layout(out, inside, transposed, block, torch.float32, None)


def values(nf4: Nf4, of: Layout) -> torch.Tensor:
    stored = dequantize_nf4(nf4, of.shape, of.block_size, torch.float64)
    return stored.T if of.transposed else stored


def loss(nf4: Nf4, of: Layout, target: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
    """Of each row, damping included."""
    gap = values(nf4, of) - target.double()
    H = H.double() + 0.01 * H.double().diagonal().mean() * torch.eye(len(H))
    return ((gap @ H) * gap).sum(1)


@given(
    st.integers(1, 12), st.integers(1, 150), st.sampled_from([32, 64]), st.booleans(), st.booleans(),
    st.floats(0.001, 1.0), st.integers(0, 2**16),
)  # fmt: skip
@settings(deadline=None, max_examples=40, derandomize=True)
def test_outputs_are_no_further_from_the_target_than_with_the_codes_it_had_or_the_nearest(
    out, inside, block, transposed, double, size, seed
):
    g = torch.Generator().manual_seed(seed)
    of = layout(out, inside, block, transposed)
    nf4 = quantize_nf4(torch.randn(of.shape, generator=g), block, double)
    target = values(nf4, of).float() + size * torch.randn(out, inside, generator=g) * 0.3
    x = torch.randn(40, inside, generator=g) @ torch.randn(inside, inside, generator=g)
    H = x.T @ x / len(x)
    chosen = rounded_for_outputs(target, nf4, of, H)
    stored = target.T.contiguous() if transposed else target
    after = loss(chosen, of, target, H).sum()
    for other in (nf4, quantize_nf4(stored, block, double)):
        assert after <= loss(other, of, target, H).sum() * (1 + 1e-4) + 1e-12  # chosen in float32
    assert chosen.codes.shape == nf4.codes.shape
    assert [None if each is None else (each.shape, each.dtype) for each in chosen] == [
        None if each is None else (each.shape, each.dtype) for each in nf4
    ]


@pytest.mark.parametrize(("size", "kept"), [(0.01, True), (3.0, False)])
def test_maxima_stay_where_the_update_is_small_and_grow_with_one_that_is_not(size, kept):
    of = layout(16, 128)
    nf4 = quantize_nf4(torch.randn(16, 128), 64, False)
    target = values(nf4, of).float() + size * torch.randn(16, 128)
    x = torch.randn(300, 128) @ torch.randn(128, 128)
    H = x.T @ x / 300
    chosen = rounded_for_outputs(target, nf4, of, H)
    assert torch.equal(chosen.absmax, nf4.absmax) == kept
    plain = quantize_nf4(target, 64, False)
    assert loss(chosen, of, target, H).sum() < 0.9 * loss(plain, of, target, H).sum()


def test_a_target_on_the_grid_is_met_exactly():
    of = layout(9, 70, 32)
    nf4 = quantize_nf4(torch.randn(9, 70), 32)
    other = nf4._replace(codes=pack(torch.randint(0, 16, (9, 70))))
    x = torch.randn(200, 70)
    chosen = rounded_for_outputs(values(other, of).float(), nf4, of, x.T @ x / 200)
    assert torch.equal(unpack(chosen.codes, (9, 70)), unpack(other.codes, (9, 70)))


def test_on_correlated_inputs_it_is_near_the_best_of_all_codes_and_nearest_codes_are_not():
    """All 16³ codes of each row, tried out."""
    torch.manual_seed(3)
    out, inside = 200, 3
    of = layout(out, inside, 32)
    nf4 = quantize_nf4(torch.randn(out, inside), 32, False)
    target = values(nf4, of).float() + 0.1 * torch.randn(out, inside)
    x = torch.randn(64, inside) @ torch.tensor([[1.0, 0.95, 0.9], [0, 0.2, 0.1], [0, 0, 0.2]])
    H = x.T @ x / 64
    scale = nf4.absmax.repeat_interleave(32)[: out * inside].view(out, inside).double()
    every = torch.tensor(list(itertools.product(CODEBOOK, repeat=inside)), dtype=torch.float64)
    gap = every[None] * scale[:, None] - target.double()[:, None]
    damped = H.double() + 0.01 * H.double().diagonal().mean() * torch.eye(inside)
    best = ((gap @ damped) * gap).sum(-1).amin(1).sum()
    found = loss(rounded_for_outputs(target, nf4, of, H), of, target, H).sum()
    levels = torch.tensor(CODEBOOK)
    rounded = (target[..., None] / scale[..., None].float() - levels).abs().argmin(-1)
    nearest = loss(nf4._replace(codes=pack(rounded)), of, target, H).sum()
    assert found < 2 * best
    assert nearest > 2 * found


def test_inputs_that_are_always_zero_leave_a_valid_choice():
    of = layout(4, 40, 32)
    nf4 = quantize_nf4(torch.randn(4, 40), 32)
    chosen = rounded_for_outputs(values(nf4, of).float() + 0.01, nf4, of, torch.zeros(40, 40))
    assert torch.isfinite(values(chosen, of)).all()


@pytest.mark.parametrize("shape", [(3, 5), (4, 6), (1, 1)])
def test_packing_is_the_inverse_of_unpacking(shape):
    index: Any = torch.randint(0, 16, shape)
    assert torch.equal(unpack(pack(index), shape), index)
    weight = torch.randn(shape)
    codes = quantize_nf4(weight).codes
    assert torch.equal(pack(unpack(codes, shape)), codes)
