"""QPiSSA and LoftQ: factors and NF4 codes found in turn, closer to the weight than codes alone."""

from __future__ import annotations

import copy
import weakref
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lrcompile
from lrcompile.errors import SpecError, TargetError
from lrcompile.kernels.nf4_dequant import dequantize_nf4, quantize_nf4
from lrcompile.nf4.modules import codes_of, nf4_weight
from lrcompile.quantizing import dequantize, is_nf4
from lrcompile.recipes.initialisers import alternating
from lrcompile.recipes.initialisers.svd import largest
from lrcompile.state import adapter_set, state_of

METHODS = ["qpissa", "loftq"]


def first(model: nn.Module) -> Any:
    return adapter_set(model, state_of(model).sites["default"][0])["default"]


def applied(model: Any, method: str, **fields: Any) -> Any:
    example_inputs = fields.pop("example_inputs", None)
    fields = {"rank": 3, "alpha": 4.5, "seed": 1, "targets": r"\d", "compute_dtype": "float32", "niter": None} | fields
    return lrcompile.apply(model, lrcompile.spec(method, **fields), example_inputs=example_inputs)


def matrix(layer: Any) -> Tensor:
    return (layer.weight.T if isinstance(layer, Conv1D) else layer.weight).detach().clone()


def error_of(model: Any, W: Tensor) -> float:
    """‖W − dq(Q) − s·B·A‖ of the first site."""
    adapter = first(model)
    return float((W - nf4_weight(model[0]) - adapter.delta()).norm())


def falling(out: int, inside: int) -> Tensor:
    g = torch.Generator().manual_seed(3)
    k = min(out, inside)
    U, _ = torch.linalg.qr(torch.randn(out, k, generator=g))
    V, _ = torch.linalg.qr(torch.randn(inside, k, generator=g))
    return U * torch.arange(1, k + 1) ** -0.6 @ V.T


def with_weight(W: Tensor) -> Any:
    model = nn.Sequential(nn.Linear(W.shape[1], W.shape[0]))
    model[0].weight.data = W.clone()
    return model


@pytest.mark.parametrize("method", METHODS)
def test_the_error_falls_or_stays_with_every_iteration(method):
    W = falling(96, 160)
    errors = [
        error_of(applied(with_weight(W), method, rank=12, alpha=12, iterations=n, double_quant=False), W)
        for n in range(1, 8)
    ]
    assert all(later <= earlier * (1 + 1e-5) for earlier, later in pairwise(errors))
    assert errors[4] < 0.97 * errors[0]


def test_a_turn_that_comes_no_closer_is_not_taken_and_does_not_end_the_turns():
    """LoftQ on this matrix: 1.8448, then 1.8482 and 1.8506, then 1.8368."""
    torch.manual_seed(5)
    W = torch.randn(24, 40)
    errors = [
        error_of(applied(with_weight(W), "loftq", iterations=n, double_quant=False, block_size=32), W)
        for n in (3, 4, 5, 6)
    ]
    assert errors[0] == errors[1] == errors[2] > errors[3]


def test_the_errors_on_the_references_spectrum_are_the_references():
    """512×768, σ_k ∝ k^-0.6, r = 64: of ‖W‖, QLoRA .187 → QPiSSA .0790 .0691 .0648 .0625 .0612, LoftQ .1496 … .1303.

    The reference does not say how U and V were drawn, so only the ratios are compared, and loosely.
    """
    W = falling(512, 768)
    plain = float((W - dequantize_nf4(quantize_nf4(W, 64, False), (512, 768), 64)).norm())
    for method, reference in (("qpissa", (0.0790, 0.0691)), ("loftq", (0.1496, 0.1384))):
        for iterations, theirs in enumerate(reference, 1):
            model = applied(
                with_weight(W), method, rank=64, alpha=64, niter=4, iterations=iterations, double_quant=False
            )
            assert error_of(model, W) / plain == pytest.approx(theirs / 0.187, rel=0.25)


def test_qpissa_is_closer_than_loftq_and_loftq_closer_than_qlora():
    W = falling(96, 160)
    errors = {m: error_of(applied(with_weight(W), m, rank=12, alpha=12), W) for m in METHODS}
    qlora = lrcompile.apply(with_weight(W), lrcompile.spec("qlora", targets=["0"], compute_dtype="float32"))
    assert errors["qpissa"] < errors["loftq"] < error_of(qlora, W)


@settings(deadline=None, max_examples=20, derandomize=True)
@given(
    inside=st.integers(2, 40),
    out=st.integers(2, 40),
    share=st.floats(0, 1),
    alpha=st.floats(0.1, 50),
    method=st.sampled_from(METHODS),
    conv1d=st.booleans(),
    block_size=st.sampled_from([32, 64]),
)
def test_the_start_is_closer_than_codes_alone_for_any_shape_rank_and_scale(
    inside, out, share, alpha, method, conv1d, block_size
):
    rank = 1 + int(share * (min(inside, out) - 1))
    model: Any = nn.Sequential(Conv1D(out, inside) if conv1d else nn.Linear(inside, out))
    nn.init.normal_(model[0].weight)
    W, stored = matrix(model[0]), model[0].weight.detach().clone()
    plain = float((stored - dequantize_nf4(quantize_nf4(stored, block_size), tuple(stored.shape), block_size)).norm())
    applied(model, method, rank=rank, alpha=alpha, block_size=block_size, double_quant=False)
    assert is_nf4(model[0])
    bound = plain if method == "loftq" else 1.2 * plain  # QPiSSA's first factors need not help a flat spectrum
    assert error_of(model, W) <= bound + 1e-5 * float(W.norm())


@pytest.mark.parametrize("conv1d", [False, True])
def test_the_factors_of_loftq_are_the_triplets_of_what_the_codes_lose(conv1d):
    model: Any = nn.Sequential(Conv1D(21, 33) if conv1d else nn.Linear(33, 21))
    W = matrix(model[0])
    applied(model, "loftq", double_quant=False)
    U, S, Vh = largest(W - nf4_weight(model[0]), 3, None, None)
    torch.testing.assert_close(first(model).delta(), U * S @ Vh, rtol=1e-4, atol=1e-5)


def test_the_codes_of_qpissa_are_those_of_what_the_factors_leave():
    model: Any = nn.Sequential(nn.Linear(33, 21))
    W = matrix(model[0])
    applied(model, "qpissa", double_quant=False, iterations=1)
    U, S, Vh = largest(W, 3, None, None)
    wanted = dequantize_nf4(quantize_nf4(W - U * S @ Vh, 64, False), (21, 33), 64)
    torch.testing.assert_close(nf4_weight(model[0]), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(first(model).delta(), U * S @ Vh, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_the_scale_is_respected_whatever_alpha_is(method):
    """PEFT's LoftQ starts right for alpha = r only."""
    W = falling(24, 40)
    starts = [applied(with_weight(W), method, alpha=alpha) for alpha in (3, 48)]
    torch.testing.assert_close(first(starts[0]).delta(), first(starts[1]).delta(), rtol=1e-4, atol=1e-5)
    assert torch.equal(nf4_weight(starts[0][0]), nf4_weight(starts[1][0]))


@pytest.mark.parametrize("method", METHODS)
def test_double_quantization_leaves_the_codes_and_moves_the_error_little(method):
    W = falling(96, 160)
    plain, double = (applied(with_weight(W), method, rank=12, double_quant=d) for d in (False, True))
    assert torch.equal(codes_of(plain[0]).codes, codes_of(double[0]).codes)
    assert codes_of(double[0]).absmax.dtype == torch.uint8
    assert all(torch.equal(a, b) for a, b in zip(first(plain).parameters(), first(double).parameters(), strict=True))
    assert error_of(double, W) <= 1.02 * error_of(plain, W)


@pytest.mark.parametrize("method", METHODS)
def test_a_proof_by_example_changes_nothing_of_the_start(method):
    base = nn.Sequential(nn.Linear(19, 33), nn.Tanh(), nn.Linear(33, 7))
    x, state = torch.randn(4, 19), torch.get_rng_state()
    proved, unproved = (
        applied(copy.deepcopy(base), method, niter=2, example_inputs=example) for example in ((x,), None)
    )
    assert all(torch.equal(value, unproved.state_dict()[key]) for key, value in proved.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(proved(x), unproved(x))


@pytest.mark.parametrize("method", METHODS)
def test_no_float_copy_of_a_weight_outlives_its_site(method, monkeypatch):
    copies: list[Any] = []
    plain = alternating.weight_of

    def watched(adapter: Any, start: Any) -> Tensor:
        assert not any(copy() is not None for copy in copies)
        weight = plain(adapter, start)
        copies.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(alternating, "weight_of", watched)
    applied(nn.Sequential(nn.Linear(9, 8), nn.Linear(8, 7), nn.Linear(7, 6)).bfloat16(), method)
    assert len(copies) == 3


@pytest.mark.parametrize("method", METHODS)
def test_only_the_factors_train_and_the_codes_keep_their_bits(method):
    model = applied(nn.Sequential(nn.Linear(19, 33), nn.Tanh(), nn.Linear(33, 7)), method)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 19)).square().sum().backward()
        optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert {key.rpartition(".")[2] for key in changed} == {"A", "B"}
    assert len(changed) == 4


@pytest.mark.parametrize("method", METHODS)
def test_remove_leaves_the_codes_and_keep_base_brings_the_bits_back(method):
    model: Any = nn.Sequential(nn.Linear(19, 7))
    W = matrix(model[0])
    applied(model, method, keep_base="cpu")
    lrcompile.remove(model)
    assert is_nf4(model[0])
    dequantize(model)
    assert torch.equal(model[0].weight, W)


@pytest.mark.parametrize("method", METHODS)
def test_an_nf4_base_is_refused_with_the_reason(method):
    model = lrcompile.quantize(nn.Sequential(nn.Linear(19, 7)))
    with pytest.raises(TargetError, match="needs the float weight"):
        applied(model, method, targets=["0"])


def test_a_weight_that_codes_cannot_hold_is_refused_by_name():
    for method in METHODS:
        model: Any = nn.Sequential(nn.Linear(19, 7))
        model[0].weight.data[0, 0] = float("inf")
        with pytest.raises(TargetError, match="'0'"):
            applied(model, method)
        assert not is_nf4(model[0])


def test_dropout_is_for_loftq_only():
    assert lrcompile.spec("loftq", dropout=0.1).dropout == 0.1  # its factors hold a correction, not the weight
    with pytest.raises(SpecError, match="dropped"):
        lrcompile.spec("qpissa", dropout=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_it_converts_to_plain_lora_on_the_same_codes(method):
    model, x = applied(nn.Sequential(nn.Linear(19, 7)), method), torch.randn(4, 19)
    y, codes = model(x), codes_of(model[0]).codes.clone()
    report = lrcompile.to_lora(model)
    assert torch.equal(model(x), y)
    assert torch.equal(codes_of(model[0]).codes, codes)
    assert "NF4 codes" in str(report)
