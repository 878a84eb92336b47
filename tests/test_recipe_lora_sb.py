"""LoRA-SB trains a small core between orthonormal factors, from AdamW's first step on."""

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

EPS = torch.finfo(torch.float64).eps


def first(model: nn.Module) -> Any:
    return adapter_set(model, state_of(model).sites["default"][0])["default"]


def square(output, batch):
    return output.square().mean()


def layer(inside=17, out=13):
    return nn.Sequential(nn.Linear(inside, out).double())


def data_for(inside=17):
    return [(torch.randn(40, inside, dtype=torch.float64),)]


def applied(model: Any, data: list, **fields: Any) -> Any:
    spec = lrcompile.spec("lora-sb", **({"rank": 3, "first_lr": 1e-3, "targets": ["0"]} | fields))
    return lrcompile.apply(model, spec, data=data, loss=square)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(inside=st.integers(1, 19), out=st.integers(1, 19), share=st.floats(0, 1), lr=st.floats(1e-6, 1))
def test_the_map_starts_as_the_best_approximation_of_adamws_first_step(inside, out, share, lr):
    torch.manual_seed(0)
    rank = 1 + int(share * (min(inside, out) - 1))
    model, data = layer(inside, out), data_for(inside)
    optimizer = torch.optim.AdamW([model[0].weight], lr=lr, weight_decay=0, eps=0)
    full = copy.deepcopy(model[0].weight.detach())
    square(model(*data[0]), data[0]).backward()
    optimizer.step()
    step = model[0].weight.detach() - full
    with torch.no_grad():
        model[0].weight.copy_(full)
    adapter = first(applied(model, data, rank=rank, first_lr=lr))
    U, S, Vh = torch.linalg.svd(step, full_matrices=False)
    best = U[:, :rank] * S[:rank] @ Vh[:rank]
    # what AdamW subtracted is known to the rounding of the weight it was subtracted from
    noise = 64 * (inside + out) * EPS * (S[0] + full.abs().max())
    gap = S[rank - 1] - S[rank] if rank < len(S) else S[rank - 1]
    if gap > 1e-3 * S[0]:  # with equal singular values there is no one best approximation
        assert (adapter.delta(torch.float64) - best).norm() <= noise * S[0] / gap
    error = (adapter.delta(torch.float64) - step).norm()
    assert abs(error - (step - best).norm()) <= noise * max(1.0, float(S[0] / gap))
    unit = torch.eye(rank, dtype=torch.float64)
    assert (adapter.A @ adapter.A.T - unit).abs().max() <= 64 * EPS
    assert (adapter.B.T @ adapter.B - unit).abs().max() <= 64 * EPS


def test_its_scale_is_one_and_there_is_no_alpha():
    model = applied(layer(), data_for())
    assert first(model).scale_value == 1
    for field in ("alpha", "scaling", "alpha_pattern"):
        with pytest.raises(lrcompile.SpecError, match=f"lora-sb has no {field}"):
            lrcompile.spec("lora-sb", first_lr=1e-3, **{field: 3})


def test_the_learning_rate_of_the_first_step_must_be_given():
    with pytest.raises(lrcompile.SpecError, match="first_lr") as caught:
        lrcompile.spec("lora-sb")
    assert caught.value.field == "first_lr"


def test_only_the_core_trains():
    torch.manual_seed(0)
    model, data = layer(), data_for()
    applied(model, data)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["0.lrcompile_adapters.weight.default.M"]
    adapter = first(model)
    before = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=1e-2)
    for _ in range(3):
        square(model(*data[0]), data[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(adapter.A, before["A"])
    assert torch.equal(adapter.B, before["B"])
    assert not torch.equal(adapter.M, before["M"])


def test_a_step_of_the_core_is_the_gradient_seen_through_the_factors():
    """With orthonormal A and B, s = 1: B·∂M·A is the part of G in their spaces, the best they can follow."""
    torch.manual_seed(0)
    model, data = layer(), data_for()
    applied(model, data)
    adapter = first(model)
    x = data[0][0]
    y = model(x)
    dy = torch.autograd.grad(square(y, None), y, retain_graph=True)[0]
    square(y, None).backward()
    A, B = adapter.A.detach(), adapter.B.detach()
    torch.testing.assert_close(B @ adapter.M.grad @ A, B @ B.T @ (dy.T @ x) @ A.T @ A, rtol=1e-12, atol=1e-15)


def test_the_output_at_the_start_is_one_step_ahead_of_the_bases():
    model, data = layer(), data_for()
    before = model(*data[0]).detach()
    applied(model, data)
    assert square(model(*data[0]), None) < square(before, None)
    with lrcompile.disabled(model):
        assert torch.equal(model(*data[0]), before)


def test_the_trained_map_merges():
    model, data = layer(), data_for()
    applied(model, data)
    before = model(*data[0]).detach()
    lrcompile.merge(model)
    torch.testing.assert_close(model(*data[0]).detach(), before, rtol=1e-12, atol=1e-13)
