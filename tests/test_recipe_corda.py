"""CorDA splits the weight by what its input is like, and leaves the map as it was."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lrcompile
from lrcompile.recipes.initialisers.covariance import _inverted
from lrcompile.state import adapter_set, state_of

transformers = pytest.importorskip("transformers")

EPS = torch.finfo(torch.float64).eps


def first(model: nn.Module) -> Any:
    return adapter_set(model, state_of(model).sites["default"][0])["default"]


def layer(inside=17, out=13, dtype=torch.float64):
    return nn.Sequential(nn.Linear(inside, out).to(dtype))


def data_for(inside=17, dtype=torch.float64):
    return [(torch.randn(60, inside, dtype=dtype) * torch.linspace(0.1, 2, inside, dtype=dtype),)]


def applied(model: Any, data: list, **fields: Any) -> Any:
    spec = lrcompile.spec("corda", **({"rank": 3, "alpha": 5.0, "targets": ["0"]} | fields))
    return lrcompile.apply(model, spec, data=data)


def split(model: Any) -> Tensor:
    adapter = first(model)
    return float(adapter.scale_value) * (adapter.B0 @ adapter.A0).detach()


shapes = given(
    inside=st.integers(1, 19), out=st.integers(1, 19), mode=st.sampled_from(["ipm", "kpm"]), alpha=st.floats(0.1, 50)
)


@settings(deadline=None, max_examples=25, derandomize=True)
@shapes
def test_at_full_rank_the_triplets_are_the_whole_weight(inside, out, mode, alpha):
    """W = U·diag(S)·V̂ᵀ with V̂ᵀ = VᵀC⁻¹."""
    torch.manual_seed(0)
    model = layer(inside, out)
    W = model[0].weight.detach().clone()
    applied(model, data_for(inside), rank=min(inside, out), mode=mode, alpha=alpha)
    condition = 2 * inside * 100  # the damping is 1 % of the mean of at most `inside` eigenvalues
    assert (split(model) - W).norm() <= 64 * EPS * condition * W.norm()


@settings(deadline=None, max_examples=25, derandomize=True)
@shapes
def test_it_takes_the_triplets_of_WC_and_keeps_the_output(inside, out, mode, alpha):
    torch.manual_seed(0)
    rank = max(1, min(inside, out) // 2)
    model, data = layer(inside, out), data_for(inside)
    W, x = model[0].weight.detach().clone(), data[0][0]
    before = model(x).detach()
    applied(model, data, rank=rank, mode=mode, alpha=alpha)
    assert (model(x) - before).abs().max() <= 1e-9 * before.abs().max()
    assert torch.equal(model[0].weight, W)
    C = _inverted(x.T @ x / len(x))[0]
    U, S, Vh = torch.linalg.svd(W @ C, full_matrices=False)
    kept = slice(0, rank) if mode == "ipm" else slice(len(S) - rank, None)
    expected = U[:, kept] * S[kept] @ Vh[kept]
    assert (split(model) @ C - expected).norm() <= 1e-9 * (W @ C).norm()


def test_the_two_factors_share_each_singular_value():
    """B = U·(S/s)^½ with orthonormal U and falling S."""
    adapter = first(applied(layer(), data_for()))
    gram = (adapter.B.T @ adapter.B).detach()
    torch.testing.assert_close(gram, torch.diag(gram.diagonal()), rtol=0, atol=1e-12)
    assert (gram.diagonal()[:-1] >= gram.diagonal()[1:]).all()


def test_a_white_input_gives_pissa():
    """For C = I the triplets are those of W."""
    torch.manual_seed(0)
    model, other = layer(8, 13), layer(8, 13)
    other.load_state_dict(model.state_dict())
    white = [(torch.eye(8, dtype=torch.float64) * 8**0.5,)]
    ours = first(applied(model, white))
    theirs = first(lrcompile.apply(other, lrcompile.spec("pissa", rank=3, alpha=5.0, targets=["0"], niter=None)))
    # C is damped by 1 %, which scales W·C and leaves its triplets: √1.01 goes from A to B
    for name, factor in (("A", 1.01**-0.5), ("B", 1.01**0.5)):
        torch.testing.assert_close(getattr(ours, name).abs(), getattr(theirs, name).abs() * factor)


def test_ipm_explains_the_output_better_than_pissa_does():
    """What it is for: the part it takes makes up most of W·x on this data."""
    torch.manual_seed(0)
    rest = {}
    data = [(torch.randn(200, 4).double() @ torch.randn(4, 17).double(),)]
    for method in ("corda", "pissa"):
        torch.manual_seed(1)
        model = layer()
        spec = lrcompile.spec(method, rank=4, targets=["0"], **({"niter": None} if method == "pissa" else {}))
        lrcompile.apply(model, spec, data=data if method == "corda" else None)
        residual = model[0].weight.detach() - split(model)
        rest[method] = float((data[0][0] @ residual.T).norm())
    assert rest["corda"] < 0.2 * rest["pissa"]


def test_kpm_leaves_what_matters_to_the_data_in_the_base():
    torch.manual_seed(0)
    data = [(torch.randn(200, 4).double() @ torch.randn(4, 17).double(),)]
    model = applied(layer(), data, mode="kpm", rank=4)
    W = model[0].weight.detach()
    assert (data[0][0] @ split(model).T).norm() <= 0.05 * (data[0][0] @ W.T).norm()


def test_a_singular_covariance_is_damped_until_it_has_an_inverse():
    C = torch.zeros(6, 6)
    C[0, 0] = 1
    damped, inverse = _inverted(C)
    torch.testing.assert_close(damped, C + torch.eye(6) * 0.01 / 6)
    assert torch.dist(damped @ inverse, torch.eye(6)) < 0.05


@pytest.mark.parametrize("residual", ["keep", "fold"])
def test_residuals_can_be_folded(residual):
    torch.manual_seed(0)
    model, data = layer(), data_for()
    before = model(*data[0]).detach()
    weight = model[0].weight.detach().clone()
    applied(model, data, residual=residual)
    torch.testing.assert_close(model(*data[0]).detach(), before, rtol=1e-9, atol=1e-9)
    assert torch.equal(model[0].weight, weight) == (residual == "keep")
    lrcompile.remove(model)
    assert torch.equal(model[0].weight, weight)


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_the_split_is_pefts_on_the_same_covariance(mode, monkeypatch):
    """PEFT 0.21 is right here, apart from dividing each sample by its largest value first; one sample shows no more
    than a factor, which moves between A and B and leaves their product.
    """
    peft = pytest.importorskip("peft")
    monkeypatch.setitem(sys.modules, "attr", dataclasses)  # PEFT does not require what it imports `dataclass` from
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    torch.manual_seed(0)
    model, theirs = layer(dtype=torch.float32), layer(dtype=torch.float32)
    theirs.load_state_dict(model.state_dict())
    data = data_for(dtype=torch.float32)
    applied(model, data, mode=mode)
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["0"], init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=mode))  # fmt: skip
    preprocess_corda(theirs, config, run_model=lambda: theirs(data[0][0]))
    wrapped = peft.get_peft_model(theirs, config)
    pair = wrapped.base_model.model[0]
    product = 5 / 3 * pair.lora_B["default"].weight @ pair.lora_A["default"].weight
    torch.testing.assert_close(split(model), product.detach(), rtol=1e-3, atol=1e-4 * float(product.abs().max()))


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_a_transformers_model_with_transposed_weights(mode):
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=37, n_positions=32)
    model = transformers.GPT2LMHeadModel(config).eval()
    data = [{"input_ids": torch.randint(37, (4, 16)), "attention_mask": torch.ones(4, 16).long()} for _ in range(3)]
    with torch.no_grad():
        before = model(**data[0]).logits
    lrcompile.apply(model, lrcompile.spec("corda", rank=4, mode=mode), data=data)
    with torch.no_grad():
        torch.testing.assert_close(model(**data[0]).logits, before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))


def test_more_ranks_than_the_weight_has_are_refused_by_name():
    with pytest.raises(lrcompile.SpecError, match=r"corda starts from 14 parts.*'0'"):
        applied(layer(), data_for(), rank_pattern={"0": 14})
