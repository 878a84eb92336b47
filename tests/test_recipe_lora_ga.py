"""LoRA-GA: its first step goes where a full fine-tuning step would, and it starts where the base is.

The paper's definition (arXiv 2407.05000). PEFT's `lora_ga` differs and is no oracle: a test below says how.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lrcompile
from lrcompile.state import adapter_set, state_of

transformers = pytest.importorskip("transformers")

EPS = torch.finfo(torch.float64).eps


def first(model: nn.Module) -> Any:
    return adapter_set(model, state_of(model).sites["default"][0])["default"]


def square(output, batch):
    return output.square().mean()


def layer(inside=17, out=13, dtype=torch.float64):
    return nn.Sequential(nn.Linear(inside, out).to(dtype))


def gradient(model: Any, data: list) -> Tensor:
    loss = sum(square(model(*batch), batch) for batch in data) / len(data)
    return torch.autograd.grad(loss, model[0].weight)[0]


def applied(model: Any, data: list, **fields: Any) -> Any:
    spec = lrcompile.spec("lora-ga", **({"rank": 3, "alpha": 5.0, "targets": ["0"]} | fields))
    return lrcompile.apply(model, spec, data=data, loss=square)


def data_for(inside=17, number=2, tokens=40, dtype=torch.float64):
    return [(torch.randn(tokens, inside, dtype=dtype),) for _ in range(number)]


shapes = given(
    inside=st.integers(2, 19),
    out=st.integers(2, 19),
    share=st.floats(0, 1),
    gamma=st.floats(0.5, 64),
    direction=st.sampled_from(["ArB2r", "A2rBr", "ArBr"]),
)


@settings(deadline=None, max_examples=25, derandomize=True)
@shapes
def test_the_first_step_is_the_best_approximation_of_the_gradient_of_rank_2r(inside, out, share, gamma, direction):
    """G·A₀ᵀA₀ + B₀B₀ᵀG = c²·G_{2r} with c² = √out/γ, exactly."""
    torch.manual_seed(0)
    rank = 1 + int(share * (min(inside, out) // 2 - 1))
    model, data = layer(inside, out), data_for(inside)
    G = gradient(model, data)
    adapter = first(applied(model, data, rank=rank, gamma=gamma, direction=direction))
    A, B = adapter.A.detach(), adapter.B.detach()
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    best = U[:, : 2 * rank] * S[: 2 * rank] @ Vh[: 2 * rank]
    c2 = out**0.5 / gamma
    gap = torch.linalg.norm(G @ A.T @ A + B @ B.T @ G - c2 * best) / torch.linalg.norm(c2 * best)
    assert gap <= 64 * (inside + out) * EPS
    unit = torch.eye(rank, dtype=torch.float64)
    assert (A @ A.T - c2 * unit).abs().max() <= 64 * c2 * EPS
    assert (B.T @ B - c2 * unit).abs().max() <= 64 * c2 * EPS


def test_the_directions_split_the_first_2r_pairs_as_the_authors_do():
    torch.manual_seed(0)
    model, data = layer(), data_for()
    U, _, Vh = torch.linalg.svd(gradient(model, data), full_matrices=False)
    for direction, a, b in (
        ("ArB2r", [0, 1, 2], [3, 4, 5]),
        ("A2rBr", [3, 4, 5], [0, 1, 2]),
        ("ArBr", [1, 3, 5], [0, 2, 4]),
    ):
        adapter = first(applied(copy.deepcopy(model), data, direction=direction, gamma=13**0.5))  # c = 1
        torch.testing.assert_close((adapter.A * Vh[a]).sum(1).abs(), torch.ones(3).double())
        torch.testing.assert_close((adapter.B * U[:, b]).sum(0).abs(), torch.ones(3).double())


def test_one_step_of_gradient_descent_changes_the_weight_by_the_gradients_best_part():
    """ΔW = −η·s²·c²·G_{2r} + O(η²): a tenth of η leaves a tenth of the relative deviation."""
    deviations = []
    for lr in (1e-3, 1e-4):
        torch.manual_seed(0)
        model, data = layer(), data_for(number=1)
        G = gradient(model, data)
        U, S, Vh = torch.linalg.svd(G, full_matrices=False)
        applied(model, data)
        adapter = first(model)
        expected = -lr * adapter.scale_value**2 * 13**0.5 / 16 * (U[:, :6] * S[:6] @ Vh[:6])
        optimizer = lrcompile.optimizer(model, torch.optim.SGD, lr=lr)
        square(model(*data[0]), data[0]).backward()
        optimizer.step()
        # the scale is a float32 tensor; the factors it multiplies are what the step changed
        deviations.append(float((adapter.delta(torch.float64) - expected).norm() / expected.norm()))
    assert deviations[0] < 0.1
    assert deviations[1] == pytest.approx(deviations[0] / 10, rel=0.1)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("residual", ["keep", "fold"])
def test_the_output_at_the_start_is_the_bases(dtype, bound, residual):
    torch.manual_seed(0)
    model, data = layer(dtype=dtype), data_for(dtype=dtype)
    before = model(*data[0])
    weight = model[0].weight.clone()
    applied(model, data, residual=residual)
    assert (model(*data[0]) - before).abs().max() <= bound * before.abs().max()
    if residual == "keep":
        assert torch.equal(model[0].weight, weight)
    else:
        left = weight.double() - adapter_offset(model)
        assert (model[0].weight.double() - left).abs().max() <= 4 * torch.finfo(dtype).eps * left.abs().max()
    lrcompile.remove(model)
    assert torch.equal(model[0].weight, weight)


def adapter_offset(model: Any) -> Tensor:
    adapter = first(model)
    return float(adapter.scale) * (adapter.B0.double() @ adapter.A0.double()).detach()  # the scale the forward has


def test_kept_and_folded_residuals_train_alike():
    outcomes = []
    for residual in ("keep", "fold"):
        torch.manual_seed(0)
        model, data = layer(), data_for()
        applied(model, data, residual=residual)
        optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=1e-2)
        for _ in range(3):
            square(model(*data[0]), data[0]).backward()
            optimizer.step()
            optimizer.zero_grad()
        outcomes.append(model(*data[0]))
    torch.testing.assert_close(outcomes[0], outcomes[1], rtol=1e-10, atol=1e-12)


def test_only_the_pair_trains_and_the_offset_stays_as_it_started():
    model, data = layer(), data_for()
    applied(model, data)
    adapter = first(model)
    started = adapter.A0.clone(), adapter.B0.clone()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "0.lrcompile_adapters.weight.default.A",
        "0.lrcompile_adapters.weight.default.B",
    }
    optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=1e-2)
    square(model(*data[0]), data[0]).backward()
    optimizer.step()
    assert torch.equal(adapter.A0, started[0])
    assert torch.equal(adapter.B0, started[1])
    assert not torch.equal(adapter.A, started[0])


def test_the_scale_is_rank_stabilised_by_default():
    assert lrcompile.spec("lora-ga", rank=4, alpha=6).scale_of("x") == 3


def test_the_trained_map_merges():
    model, data = layer(), data_for()
    applied(model, data)
    with torch.no_grad():
        first(model).B.add_(torch.randn_like(first(model).B))
    before = model(*data[0]).detach()
    lrcompile.merge(model)
    torch.testing.assert_close(model(*data[0]), before, rtol=1e-6, atol=1e-6 * float(before.abs().max()))


def test_a_rank_above_half_the_smaller_side_is_refused_by_name():
    model = layer(9, 13)
    with pytest.raises(lrcompile.SpecError, match=r"10 singular pairs.*'0'.*only 9: a rank of 4 is the most") as caught:
        applied(model, data_for(9), rank=5)
    assert caught.value.field == "rank"
    assert type(model[0]) is nn.Linear
    applied(model, data_for(9), rank=4)


def test_a_large_gradient_is_decomposed_at_random_and_the_seed_decides_how():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 280, bias=False))
    data = [(torch.randn(60, 300) * 0.8 ** torch.arange(300),)]
    G = gradient(model, data)
    found = []
    for seed in (1, 1, 2):
        torch.rand(2)
        found.append(first(applied(copy.deepcopy(model), data, seed=seed)))
    assert torch.equal(found[0].A, found[1].A)
    assert not torch.equal(found[0].A, found[2].A)
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    best = U[:, :6] * S[:6] @ Vh[:6]
    A, B = found[0].A, found[0].B
    assert torch.linalg.norm(G @ A.T @ A + B @ B.T @ G - 280**0.5 / 16 * best) <= 1e-3 * torch.linalg.norm(best)


def test_pefts_variant_is_another_method():
    """With singular values in B and c on B only, the identity misses by more than its own size."""
    torch.manual_seed(0)
    G, rank, c = torch.randn(13, 17, dtype=torch.float64), 3, 13**0.25 / 16**0.5
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    A, B = Vh[:rank], c * U[:, rank : 2 * rank] * S[rank : 2 * rank]
    best = c**2 * (U[:, : 2 * rank] * S[: 2 * rank]) @ Vh[: 2 * rank]
    assert torch.linalg.norm(G @ A.T @ A + B @ B.T @ G - best) > torch.linalg.norm(best)


@pytest.mark.parametrize("residual", ["keep", "fold"])
def test_a_transformers_model_with_its_own_loss_and_transposed_weights(residual):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=24, n_layer=2, n_head=2, vocab_size=37, n_positions=32, resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(37, (3, 2, 11))
    data = [transformers.BatchEncoding({"input_ids": each, "labels": each}) for each in ids]
    with torch.no_grad():
        before = model(**data[0]).logits
    spec = lrcompile.spec("lora-ga", rank=4, alpha=8, batches=3, residual=residual, seed=0)
    lrcompile.apply(model, spec, data=data)
    with torch.no_grad():
        torch.testing.assert_close(model(**data[0]).logits, before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
    model.train()
    optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=1e-3)
    losses = []
    for _ in range(6):
        loss = model(**data[0]).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
