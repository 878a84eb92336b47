"""LoRA-One starts one step of gradient descent ahead, along the best rank-r part of the gradient."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lrcompile
from lrcompile.matching import match
from lrcompile.recipes.calibration.gradients import Gradients
from lrcompile.state import adapter_set, state_of

transformers = pytest.importorskip("transformers")

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
    spec = lrcompile.spec("lora-one", **({"rank": 3, "alpha": 5.0, "targets": ["0"]} | fields))
    return lrcompile.apply(model, spec, data=data, loss=square)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(inside=st.integers(1, 19), out=st.integers(1, 19), share=st.floats(0, 1), gamma=st.floats(0.5, 200))
def test_the_product_is_along_the_best_approximation_of_the_negative_gradient(inside, out, share, gamma):
    torch.manual_seed(0)
    rank = 1 + int(share * (min(inside, out) - 1))
    model, data = layer(inside, out), data_for(inside)
    G = torch.autograd.grad(square(model(*data[0]), data[0]), model[0].weight)[0]
    adapter = first(applied(model, data, rank=rank, gamma=gamma))
    A, B = adapter.A.detach(), adapter.B.detach()
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    expected = -(U[:, :rank] * S[:rank] @ Vh[:rank]) / (gamma * S[0])
    assert (B @ A - expected).norm() <= 64 * (inside + out) * EPS * expected.norm()
    ratio = torch.diag(S[:rank] / S[0]) / gamma
    assert (A @ A.T - ratio).abs().max() <= 64 * (inside + out) * EPS / gamma
    assert (B.T @ B - ratio).abs().max() <= 64 * (inside + out) * EPS / gamma


def test_the_output_at_the_start_is_not_the_bases_but_a_step_downhill():
    """By design: `init output == base` holds for the other methods."""
    torch.manual_seed(0)
    model, data = layer(), data_for()
    before = model(*data[0]).detach()
    loss = float(square(before, None))
    applied(model, data)
    after = model(*data[0]).detach()
    assert not torch.allclose(after, before, rtol=1e-3)
    assert float(square(after, None)) < loss
    with lrcompile.disabled(model):
        assert torch.equal(model(*data[0]), before)


def test_the_update_at_the_start_has_spectral_norm_s_over_gamma():
    model = applied(layer(), data_for(), rank=4, alpha=6, gamma=20)
    norm = torch.linalg.matrix_norm(first(model).delta(torch.float64), 2)
    assert float(norm) == pytest.approx(6 / 4**0.5 / 20, rel=1e-6)  # the scale is a float32 tensor


def test_the_size_of_the_loss_does_not_matter():
    model, data = layer(), data_for()
    small = first(applied(copy.deepcopy(model), data))
    spec = lrcompile.spec("lora-one", rank=3, alpha=5.0, targets=["0"])
    large = first(lrcompile.apply(copy.deepcopy(model), spec, data=data, loss=lambda o, b: 1e4 * square(o, b)))
    torch.testing.assert_close(large.delta(torch.float64), small.delta(torch.float64), rtol=1e-9, atol=1e-12)


def test_both_factors_train_from_the_first_step():
    model, data = layer(), data_for()
    applied(model, data)
    square(model(*data[0]), data[0]).backward()
    assert first(model).A.grad.abs().min() > 0
    assert first(model).B.grad.abs().min() > 0


def test_an_expert_without_a_token_starts_as_plain_lora():
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.maps = nn.Parameter(torch.randn(3, 6, 5))

        def forward(self, x):
            return torch.bmm(x, self.maps)

    data = [(torch.randn(3, 4, 6) * torch.tensor([1.0, 0.0, 1.0])[:, None, None],)]
    net = Stack()
    spec = lrcompile.spec("lora-one", rank=2, targets=["maps"])
    G = Gradients(net, spec, match(net, spec).hit).run(data, square)[1]["maps"]
    assert [bool(g.any()) for g in G] == [True, False, True]
    adapter = first(lrcompile.apply(net, spec, data=data, loss=square))
    assert torch.isfinite(adapter.A).all()
    assert torch.isfinite(adapter.B).all()
    assert [bool(b.any()) for b in adapter.B] == [True, False, True]
    assert all(bool(a.any()) for a in adapter.A)


def test_more_ranks_than_the_gradient_has_are_refused_by_name():
    with pytest.raises(lrcompile.SpecError, match=r"10 singular pairs.*'0'.*only 9: a rank of 9 is the most"):
        applied(layer(9, 13), data_for(9), rank_pattern={"0": 10})


def test_a_transformers_model_with_its_own_loss():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=37)  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(37, (2, 11))
    data = [{"input_ids": ids, "labels": ids}]
    with torch.no_grad():
        before = model(**data[0]).loss
    lrcompile.apply(model, lrcompile.spec("lora-one", rank=4, alpha=8), data=data)
    with torch.no_grad():
        assert model(**data[0]).loss < before
