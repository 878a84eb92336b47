"""LoRA (arXiv 2106.09685) and its rank-stabilised scale (arXiv 2312.03732): what they promise, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lrcompile
from lrcompile.state import adapter_set, state_of

SIZES = st.tuples(st.integers(2, 14), st.integers(2, 14), st.integers(1, 5))


def adapted(
    inside: int = 9, out: int = 7, rank: int = 3, *, method: str = "lora", dtype=torch.float64, **fields
) -> Any:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(inside, out, dtype=dtype))
    spec = lrcompile.spec(method, rank=rank, targets=["0"], rank_pattern={"0": rank}, seed=1, **fields)
    return lrcompile.apply(model, spec)


def factors(model: Any) -> Any:
    return adapter_set(model, state_of(model).sites["default"][0])["default"]


def shaken(model: Any) -> Any:
    nn.init.normal_(factors(model).B)
    return model


@given(sizes=SIZES)
@settings(deadline=None, max_examples=20, derandomize=True)
def test_output_is_the_bases_bits_at_the_start(sizes):
    model, x = adapted(*sizes), torch.randn(4, sizes[0], dtype=torch.float64)
    with lrcompile.disabled(model):
        expected = model(x)
    assert torch.equal(model(x), expected)


def test_the_first_gradient_of_A_is_exactly_zero_and_that_of_B_is_not():
    model = adapted()
    model(torch.randn(4, 9, dtype=torch.float64)).sum().backward()
    assert not factors(model).A.grad.any()
    assert factors(model).B.grad.any()


@given(sizes=SIZES, alpha=st.floats(0.5, 8))
@settings(deadline=None, max_examples=20, derandomize=True)
def test_gradients_are_those_of_the_weight_through_the_other_factor(sizes, alpha):
    """∂A = s·Bᵀ·G and ∂B = s·G·Aᵀ with G = ∂L/∂W."""
    model = shaken(adapted(*sizes, alpha=alpha))
    model[0].weight.requires_grad_(True)
    x = torch.randn(4, sizes[0], dtype=torch.float64)
    model(x).square().sum().backward()
    pair, G = factors(model), model[0].weight.grad
    s = float(pair.scale)  # as the forward has it, in float32
    for found, expected in ((pair.A.grad, s * pair.B.T @ G), (pair.B.grad, s * G @ pair.A.T)):
        assert torch.allclose(found, expected, rtol=1e-10, atol=1e-10)


@given(sizes=SIZES)
@settings(deadline=None, max_examples=20, derandomize=True)
def test_the_merged_update_has_at_most_the_rank(sizes):
    model = shaken(adapted(*sizes))
    before = model[0].weight.clone()
    lrcompile.merge(model)
    assert torch.linalg.matrix_rank(model[0].weight - before, rtol=1e-10) <= sizes[2]


@given(sizes=SIZES)
@settings(deadline=None, max_examples=20, derandomize=True)
def test_it_trains_rank_times_in_plus_out_numbers(sizes):
    inside, out, rank = sizes
    assert sum(p.numel() for p in adapted(*sizes).parameters() if p.requires_grad) == rank * (inside + out)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_merged_computes_the_same_and_unmerged_has_the_bits_back(dtype):
    model, x = shaken(adapted(dtype=dtype)), torch.randn(4, 9, dtype=dtype)
    bits, expected = model[0].weight.clone(), model(x)
    lrcompile.merge(model)
    assert torch.allclose(model(x), expected, rtol=1e-5, atol=1e-5)
    lrcompile.unmerge(model)
    assert torch.equal(model[0].weight, bits)


def test_doubling_alpha_doubles_the_scale_and_the_update():
    once, twice = (shaken(adapted(alpha=alpha)) for alpha in (4.0, 8.0))
    factors(twice).B.data = factors(once).B.data
    assert float(factors(twice).scale) == 2 * float(factors(once).scale)
    assert torch.equal(factors(twice).delta(torch.float64), 2 * factors(once).delta(torch.float64))


def test_the_order_of_the_ranks_does_not_matter():
    model, x = shaken(adapted(rank=4)), torch.randn(5, 9, dtype=torch.float64)
    expected, order = model(x), torch.tensor([2, 0, 3, 1])
    pair = factors(model)
    pair.A.data, pair.B.data = pair.A.data[order], pair.B.data[:, order]
    assert torch.allclose(model(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_keeps_x_and_the_code_for_the_backward_pass(dtype):
    """b·T·(in + r) numbers a site."""
    model: Any = nn.Sequential(nn.Linear(64, 48, dtype=dtype))
    shaken(lrcompile.apply(model, lrcompile.spec("lora", rank=5, targets=["0"], dtype=str(dtype).split(".")[1])))
    kept: dict[int, int] = {}
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.numel() > 1:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(100, 64, dtype=dtype)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(x)
    assert sum(kept.values()) == 100 * (64 + 5) * dtype.itemsize
    del out


@given(rank=st.integers(1, 64), alpha=st.floats(0.1, 64))
@settings(deadline=None, max_examples=30, derandomize=True)
def test_the_stabilised_scale_is_root_rank_times_loras(rank, alpha):
    plain = lrcompile.spec("lora", rank=rank, alpha=alpha).scale_of("q")
    stable = lrcompile.spec("rslora", rank=rank, alpha=alpha).scale_of("q")
    assert stable == pytest.approx(math.sqrt(rank) * plain, rel=1e-15)
    assert stable == pytest.approx(lrcompile.spec("lora", rank=rank, alpha=alpha * math.sqrt(rank)).scale_of("q"))


def test_at_rank_one_the_stabilised_scale_is_loras():
    assert lrcompile.spec("rslora", rank=1, alpha=3.0).scale_of("q") == lrcompile.spec(
        "lora", rank=1, alpha=3.0
    ).scale_of("q")


def test_a_stabilised_rank_pattern_scales_each_site_by_its_own_rank():
    spec = lrcompile.spec("rslora", rank=4, alpha=8.0, rank_pattern={"k": 16})
    assert (spec.scale_of("q"), spec.scale_of("k")) == (4.0, 2.0)
