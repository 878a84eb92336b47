"""LoRA-XS: one small matrix trains between frozen singular vectors of the weight."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lrcompile
from lrcompile.state import adapter_set, state_of


def first(model: nn.Module) -> Any:
    return adapter_set(model, state_of(model).sites["default"][0])["default"]


def applied(model: Any, **fields: Any) -> Any:
    return lrcompile.apply(
        model, lrcompile.spec("lora-xs", **{"rank": 3, "alpha": 4.5, "seed": 1, "targets": r"\d"} | fields)
    )


def one(inside: int = 17, out: int = 11, dtype: torch.dtype = torch.float64) -> Any:
    return nn.Sequential(nn.Linear(inside, out, dtype=dtype))


@settings(deadline=None, max_examples=20, derandomize=True)
@given(inside=st.integers(1, 19), out=st.integers(1, 19), share=st.floats(0, 1))
def test_the_frozen_factors_are_the_largest_triplets_with_S_on_the_side_of_the_input(inside, out, share):
    rank = 1 + int(share * (min(inside, out) - 1))
    model = one(inside, out)
    W = model[0].weight.detach().clone()
    adapter = first(applied(model, rank=rank))
    U, S, Vh = torch.linalg.svd(W)
    torch.testing.assert_close(adapter.B @ adapter.A, U[:, :rank] * S[:rank] @ Vh[:rank], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(adapter.B.T @ adapter.B, torch.eye(rank).double(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(adapter.A.norm(dim=1), S[:rank], rtol=1e-9, atol=1e-12)


def test_the_core_starts_normal_with_deviation_1e_5():
    M = first(applied(one(80, 70), rank=64)).M.detach()
    assert M.shape == (64, 64)
    # 4096 draws: the deviation is within 5 of its own standard errors
    assert float(M.std()) == pytest.approx(1e-5, rel=5 / (2 * 4096) ** 0.5)
    assert abs(float(M.mean())) <= 5e-5 / 64


def test_the_output_moves_by_no_more_than_the_core_at_the_start():
    model, x = one(), torch.randn(4, 17).double()
    y, size = model(x), torch.linalg.matrix_norm(model[0].weight, 2)
    adapter = first(applied(model))
    bound = adapter.scale_value * size * torch.linalg.matrix_norm(adapter.M, 2) * x.norm(dim=1)
    assert bool(((model(x) - y).norm(dim=1) <= bound * (1 + 1e-9)).all())


def test_only_the_core_trains_rank_squared_numbers_a_site_and_all_else_keeps_its_bits():
    model = applied(nn.Sequential(nn.Linear(17, 11), nn.Tanh(), nn.Linear(11, 7)))
    assert lrcompile.report(model).trainable == 2 * 9
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 17)).square().sum().backward()
        optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {name.rpartition(".")[2] for name in changed} == {"M"}
    assert len(changed) == 2


def test_the_gradient_of_the_core_is_s_Bt_G_At():
    model = applied(one())
    x, G = torch.randn(4, 17).double(), torch.randn(4, 11).double()
    (model(x) * G).sum().backward()
    adapter = first(model)
    expected = adapter.scale_value * adapter.B.T @ (G.T @ x) @ adapter.A.T
    torch.testing.assert_close(adapter.M.grad, expected, rtol=1e-12, atol=1e-12)


def test_merged_equals_unmerged_and_conversion_is_exact():
    model, x = applied(nn.Sequential(nn.Linear(17, 11), nn.Tanh(), nn.Linear(11, 7)).double()), torch.randn(4, 17)
    x = x.double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("M"):
                p.normal_()
    y = model(x)
    lrcompile.merge(model)
    torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)
    lrcompile.unmerge(model)
    report = lrcompile.to_lora(model)
    assert report.relative_error == 0
    assert torch.equal(model(x), y)


def test_it_works_on_an_nf4_base_from_the_values_it_holds():
    model: Any = lrcompile.quantize(one(dtype=torch.float32))
    W = model[0].weight.clone()
    adapter = first(applied(model))
    U, S, Vh = torch.linalg.svd(W)
    torch.testing.assert_close(adapter.B @ adapter.A, U[:, :3] * S[:3] @ Vh[:3], rtol=1e-4, atol=1e-5)


def test_a_seed_decides_the_start_also_of_an_inexact_svd():
    base = one()
    tensors = [copy.deepcopy(first(applied(copy.deepcopy(base), niter=2, seed=s)).state_dict()) for s in (5, 5, 6)]
    assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in "ABM")
    assert not any(torch.equal(tensors[0][key], tensors[2][key]) for key in "ABM")
