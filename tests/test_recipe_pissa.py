"""PiSSA, MiLoRA and OLoRA take a part of the weight into their factors and leave the map as it was.

Their base stays beside the factors (`residual="keep"`, here) or holds what they leave of it (`test_residuals.py`).
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lrcompile
from lrcompile.errors import SpecError, TargetError
from lrcompile.recipes.initialisers.svd import largest
from lrcompile.state import adapter_set, state_of

METHODS = ["pissa", "milora", "olora"]
SINGULAR = ["pissa", "milora"]


def first(model: nn.Module, name: str = "default") -> Any:
    return adapter_set(model, state_of(model).sites[name][0])[name]


def applied(model: Any, method: str = "pissa", **fields: Any) -> Any:
    fields = {"rank": 3, "alpha": 4.5, "seed": 1, "targets": r".*\d"} | fields
    if method == "pissa":
        fields = {"niter": None} | fields
    return lrcompile.apply(model, lrcompile.spec(method, **fields))


def one(inside: int = 17, out: int = 11, dtype: torch.dtype = torch.float64, conv1d: bool = False) -> Any:
    return nn.Sequential((Conv1D(out, inside) if conv1d else nn.Linear(inside, out)).to(dtype))


def matrix(layer: Any) -> Tensor:
    """The weight as [out, in]."""
    return (layer.weight.T if isinstance(layer, Conv1D) else layer.weight).detach()


def falling(out: int, inside: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A matrix with singular values k^-0.6."""
    g = torch.Generator().manual_seed(3)
    k = min(out, inside)
    U, _ = torch.linalg.qr(torch.randn(out, k, generator=g, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(inside, k, generator=g, dtype=torch.float64))
    return (U * torch.arange(1, k + 1, dtype=torch.float64) ** -0.6 @ V.T).to(dtype)


def trained(model: Any, size: float = 0.3) -> Any:
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype))
    return model


shapes = given(
    inside=st.integers(1, 19),
    out=st.integers(1, 19),
    share=st.floats(0, 1),
    alpha=st.floats(0.1, 50),
    method=st.sampled_from(METHODS),
    conv1d=st.booleans(),
)


@settings(deadline=None, max_examples=25, derandomize=True)
@shapes
def test_output_is_preserved_at_init_for_any_shape_rank_and_scale(inside, out, share, alpha, method, conv1d):
    rank = 1 + int(share * (min(inside, out) - 1))
    model, x = one(inside, out, conv1d=conv1d), torch.randn(5, inside, dtype=torch.float64)
    y = model(x)
    applied(model, method, rank=rank, alpha=alpha)
    assert (model(x) - y).norm() <= 64 * torch.finfo(torch.float64).eps * y.norm() * max(1, alpha / rank)


@pytest.mark.parametrize("niter", [None, 0, 1, 4, 16])
def test_output_is_preserved_at_init_also_for_an_inexact_svd(niter):
    model, x = one(67, 41, torch.float32), torch.randn(9, 67)
    y = model(x)
    applied(model, niter=niter, rank=8)
    assert (model(x) - y).norm() <= 6e-7 * y.norm()


@pytest.mark.parametrize("method", METHODS)
def test_the_base_keeps_its_bits_and_remove_leaves_nothing(method):
    model = nn.Sequential(one(), nn.Tanh(), one(11, 7))
    before, classes = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    trained(applied(model, method))
    with lrcompile.disabled(model):
        assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    lrcompile.remove(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert [type(m) for m in model.modules()] == classes


def test_squared_norms_of_weight_residual_and_part_add_up_for_an_exact_svd():
    for method in SINGULAR:
        model = one()
        W = matrix(model[0])
        applied(model, method)
        part = first(model).B0 @ first(model).A0 * first(model).scale_value
        torch.testing.assert_close(W.norm() ** 2, (W - part).norm() ** 2 + part.norm() ** 2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", SINGULAR)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_AAt_and_BtB_are_both_the_singular_values_over_s(method, dtype):
    model = one(dtype=dtype)
    S = torch.linalg.svdvals(matrix(model[0]))
    applied(model, method, rank=4, alpha=6)
    wanted = torch.diag((S[:4] if method == "pissa" else S[-4:]) / 1.5)
    adapter = first(model)
    for gram in (adapter.A @ adapter.A.T, adapter.B.T @ adapter.B):
        assert (gram - wanted).abs().max() <= 64 * torch.finfo(dtype).eps * S[0]


def test_pissa_takes_the_largest_triplets_and_milora_the_smallest():
    W = falling(23, 31)
    S = torch.linalg.svdvals(W)
    for method, values in (("pissa", S[:3]), ("milora", S[-3:])):
        model = one(31, 23)
        model[0].weight.data = W.clone()
        applied(model, method, alpha=4)
        part = first(model).B @ first(model).A * first(model).scale_value
        torch.testing.assert_close(torch.linalg.svdvals(part)[:3], values, rtol=1e-10, atol=1e-12)


def test_the_energy_captured_rises_with_niter_to_the_optimum():
    """Spectrum k^-0.6, 512×768, r = 64; the bounds are just under what five seeds gave."""
    W = falling(512, 768, torch.float32)
    best = float(largest(W, 64, None, None)[1].square().sum())
    energy = []
    for niter, least in ((0, 0.82), (1, 0.975), (2, 0.99), (4, 0.997), (8, 0.999), (16, 0.9996)):
        U, S, Vh = largest(W, 64, niter, torch.Generator().manual_seed(0))
        energy.append(float(S.square().sum()) / best)
        assert least <= energy[-1] <= 1 + 1e-5
        assert (U.T @ U - torch.eye(64)).abs().max() < 1e-4
        assert (Vh @ Vh.T - torch.eye(64)).abs().max() < 1e-4
    assert energy == sorted(energy)


@pytest.mark.parametrize("method", METHODS)
def test_conversion_to_plain_lora_equals_the_residual_and_the_trained_pair(method):
    model = one()
    W = matrix(model[0])
    trained(applied(model, method))
    adapter = first(model)
    s, A, B, A0, B0 = (adapter.scale_value, *(getattr(adapter, n).detach() for n in ("A", "B", "A0", "B0")))
    lrcompile.to_lora(model)
    plain = first(model)
    assert plain.A.shape == (6, 17)
    torch.testing.assert_close(
        W + plain.scale_value * plain.B @ plain.A, (W - s * B0 @ A0) + s * B @ A, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("method", METHODS)
def test_merged_equals_unmerged(method):
    model, x = trained(applied(nn.Sequential(one(), nn.Tanh(), one(11, 7)), method)), torch.randn(4, 17).double()
    y = model(x)
    lrcompile.merge(model)
    torch.testing.assert_close(model(x), y, rtol=1e-11, atol=1e-11)
    lrcompile.unmerge(model)
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("method", METHODS)
def test_frozen_tensors_keep_their_bits_through_training(method):
    model = applied(nn.Sequential(one(), nn.Tanh(), one(11, 7)), method)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    moving = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    assert {n.rpartition(".")[2] for n in frozen} == {"weight", "bias", "A0", "B0"}
    optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 17).double()).square().sum().backward()
        optimizer.step()
    named = dict(model.named_parameters())
    assert all(torch.equal(named[n], value) for n, value in frozen.items())
    assert not any(torch.equal(named[n], value) for n, value in moving.items())


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_lora_on_the_residual(method):
    model = trained(applied(one(), method))
    adapter, W, b = first(model), matrix(model[0]), model[0].bias.detach()
    x, G = torch.randn(4, 17).double(), torch.randn(4, 11).double()
    (model(x) * G).sum().backward()
    A, B = (t.detach().clone().requires_grad_() for t in (adapter.A, adapter.B))
    residual = W - adapter.scale_value * adapter.B0 @ adapter.A0
    ((x @ residual.T + b + adapter.scale_value * x @ A.T @ B.T) * G).sum().backward()
    for ours, theirs in ((adapter.A.grad, A.grad), (adapter.B.grad, B.grad)):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_two_adapters_on_one_base_do_not_corrupt_each_other():
    model, x = one(), torch.randn(4, 17).double()
    W, y = matrix(model[0]).clone(), model(x)
    for name in ("a", "b"):
        lrcompile.apply(model, lrcompile.spec("pissa", rank=3, alpha=4.5, niter=None, targets=["0"]), name=name)
        torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)
        trained(model)
    a, b = first(model, "a"), first(model, "b")
    assert torch.equal(a.A0, b.A0)  # the second started from W, not from what the first had left of it
    lrcompile.activate(model, ["a", "b"])
    both = W + sum(n.scale_value * (n.B @ n.A - n.B0 @ n.A0) for n in (a, b))
    torch.testing.assert_close(model(x), x @ both.T + model[0].bias, rtol=1e-12, atol=1e-12)
    lrcompile.remove(model, "a")
    lrcompile.remove(model, "b")
    assert torch.equal(matrix(model[0]), W)


def test_a_stack_of_maps_starts_each_from_its_own_weight():
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.maps = nn.Parameter(torch.randn(4, 7, 9, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(x, self.maps)

    for method in METHODS:
        model, x = Stack(), torch.randn(4, 3, 7, dtype=torch.float64)
        y = model(x)
        applied(model, method, targets=["maps"])
        torch.testing.assert_close(model(x), y, rtol=1e-11, atol=1e-11)
        adapter = first(model)
        assert adapter.A.shape == (4, 3, 7)
        if method == "pissa":
            S = torch.linalg.svdvals(model.maps)[:, :3] / adapter.scale_value
            torch.testing.assert_close(adapter.A.square().sum(-1), S, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_an_embedding_starts_from_its_table(method):
    model, ids = nn.Sequential(nn.Embedding(13, 7, padding_idx=2)).double(), torch.arange(13)
    y = model(ids)
    applied(model, method, targets=["0"])
    torch.testing.assert_close(model(ids), y, rtol=1e-12, atol=1e-12)
    assert (first(model).A.shape, first(model).B.shape) == ((3, 13), (7, 3))


def test_a_seed_decides_the_start_and_leaves_torchs_generator_alone():
    state = torch.get_rng_state()
    base = one()
    torch.set_rng_state(state)
    starts = [first(applied(copy.deepcopy(base), niter=1, seed=seed)).A.detach() for seed in (5, 5, 6)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_a_rank_that_the_weight_has_not_is_refused_by_name():
    for method in METHODS:
        model = one()
        with pytest.raises(SpecError, match=r"12 parts of the weight of '0', which has 11") as raised:
            applied(model, method, rank_pattern={"0": 12})
        assert raised.value.field == "rank_pattern"
        assert list(model.state_dict()) == ["0.weight", "0.bias"]


@pytest.mark.parametrize(("value", "why"), [(0.0, "is zero"), (float("nan"), "NaN")])
def test_a_weight_without_triplets_is_refused_by_name(value, why):
    for method in METHODS:
        model = one()
        model[0].weight.data.fill_(value)
        with pytest.raises(TargetError, match=rf"'0' .*{why}"):
            applied(model, method)


@pytest.mark.parametrize("method", METHODS)
def test_an_nf4_base_is_refused_with_the_method_that_takes_one(method):
    model = lrcompile.quantize(one(dtype=torch.float32))
    with pytest.raises(TargetError, match=r"NF4 codes.*qpissa"):
        applied(model, method)


@pytest.mark.parametrize("method", METHODS)
def test_dropout_is_refused_with_the_reason(method):
    with pytest.raises(SpecError, match="dropped"):
        lrcompile.spec(method, dropout=0.1)


@pytest.mark.parametrize("alpha", [6, 9])
@pytest.mark.parametrize(("method", "theirs"), [("pissa", "pissa"), ("olora", "olora")])
def test_peft_starts_with_the_same_factors_up_to_sign_and_the_same_residual(method, theirs, alpha):
    peft = pytest.importorskip("peft")
    model = one(dtype=torch.float32)
    other = copy.deepcopy(model)
    applied(model, method, rank=6, alpha=alpha)
    config = peft.LoraConfig(r=6, lora_alpha=alpha, init_lora_weights=theirs, target_modules=["0"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = peft.get_peft_model(other, config).base_model.model[0]
    ours, size = first(model), matrix(model[0]).norm()
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    bound = 64 * torch.finfo(torch.float32).eps * size
    signs = (ours.A * A).sum(1).sign()
    assert (ours.A - signs[:, None] * A).abs().max() <= 16 * bound
    assert (ours.B - signs * B).abs().max() <= 16 * bound
    residual = matrix(model[0]) - ours.scale_value * ours.B0 @ ours.A0
    assert (residual - layer.base_layer.weight).abs().max() <= bound
