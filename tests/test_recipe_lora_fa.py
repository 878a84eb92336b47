"""LoRA-FA (methods_dense 2.11): A stays, only xAᵀ is saved, and the step of B is the nearest to that of W."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lrcompile
from lrcompile.dialect.dropped import dropped
from lrcompile.optim import lora_fa
from lrcompile.optim.grams import gram, inverse
from lrcompile.optim.lora_fa import Correction
from lrcompile.optim.rule import Step

IN, OUT, RANK, ROWS = 37, 23, 5, 64


def adapted(method="lora-fa", dtype=torch.float64, model: nn.Module | None = None, **fields) -> tuple[Any, Any]:
    fields = {"rank": RANK, "alpha": 7.0, "seed": 0} | fields
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT)) if model is None else model
    lrcompile.apply(model.to(dtype), lrcompile.spec(method, **fields))
    adapter: Any = model[0].lrcompile_adapters["weight"]["default"]  # type: ignore[index]
    with torch.no_grad():
        adapter.B.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    return model, adapter


def saved(model: nn.Module, x: Tensor) -> int:
    """Bytes a forward keeps for the backward pass, each storage once, without what the model has anyway."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}
    held = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)  # or its address might be given again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("first", [True, False], ids=["first layer", "inner layer"])
@pytest.mark.parametrize("rank", [1, 5, 16])
def test_it_saves_exactly_rows_times_rank(dtype, dropout, first, rank):
    model, _ = adapted(dtype=dtype, dropout=dropout, rank=rank)
    model.to(dtype)  # the factors too, which are float32 beside a bfloat16 base
    size = torch.finfo(dtype).bits // 8
    the_scale = size if dtype != torch.float32 and not first else 0  # one number, cast from float32
    assert saved(model, torch.randn(ROWS, IN, dtype=dtype, requires_grad=not first)) == ROWS * rank * size + the_scale


def test_lora_saves_the_input_as_well():
    model, _ = adapted("lora", torch.float32)
    assert saved(model, torch.randn(ROWS, IN, requires_grad=True)) == ROWS * (IN + RANK) * 4


def test_dropout_that_is_drawn_again_has_the_gradients_of_a_mask_that_was_kept():
    model, adapter = adapted(dropout=0.4)
    layer = model[0]
    x = torch.randn(ROWS, IN, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(5)
    y = layer(x)
    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    # the mask of this forward, read off x = 1 with the same seed through a map whose A passes it on
    torch.manual_seed(5)
    mask = dropped(torch.ones_like(x).requires_grad_(), 0.4, adapter.A).detach()
    kept = float((mask != 0).double().mean())
    assert abs(kept - 0.6) < 5 * (0.6 * 0.4 / mask.numel()) ** 0.5
    assert torch.equal(mask[mask != 0], torch.full_like(mask[mask != 0], 1 / 0.6))
    s = adapter.scale.double()
    expected_B = s * weights.mT @ ((x * mask) @ adapter.A.mT)
    expected_x = weights @ layer.weight + s * ((weights @ adapter.B) @ adapter.A) * mask
    torch.testing.assert_close(adapter.B.grad, expected_B, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, expected_x, rtol=1e-12, atol=1e-12)


def test_the_mask_does_not_depend_on_strides():
    model, _ = adapted(dropout=0.4)
    results = []
    strided = torch.arange(IN * ROWS).double().view(IN, ROWS).t()
    for values in (strided, strided.contiguous()):
        x = values.detach().requires_grad_()
        torch.manual_seed(5)
        model(x).sum().backward()
        results.append(x.grad)
    torch.testing.assert_close(*results, rtol=1e-12, atol=0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_dropout_under_gradient_checkpointing(reentrant):
    grads = []
    for checkpointed in (False, True):
        model, adapter = adapted(dropout=0.4)
        x = torch.randn(ROWS, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
        torch.manual_seed(5)
        inner = nn.Sequential(nn.ReLU(), model)  # so that what the site gets has no gradient in the first forward
        y = torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=reentrant) if checkpointed else inner(x)
        y.square().sum().backward()
        grads += [adapter.B.grad, x.grad]
    assert torch.equal(grads[0], grads[2])
    assert torch.equal(grads[1], grads[3])


def test_dropout_under_autocast_and_twice_differentiated():
    model, adapter = adapted(dtype=torch.float32, dropout=0.4)
    x = torch.randn(ROWS, IN, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(x).float().square().sum().backward()
    assert x.grad is not None
    assert adapter.B.grad.dtype == torch.float32
    (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    grad.square().sum().backward()


def test_the_gradient_of_B_is_that_of_lora_at_the_same_point():
    grads = []
    for method in ("lora", "lora-fa"):
        model, adapter = adapted(method)
        model(torch.linspace(-1, 1, ROWS * IN, dtype=torch.float64).view(ROWS, IN)).square().mean().backward()
        grads.append(adapter.B.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("correction", [True, False])
def test_A_is_unchanged_after_training_and_the_update_lies_in_its_rows(correction):
    model, adapter = adapted(correction=correction)
    A = adapter.A.detach().clone()
    optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(ROWS, IN, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
    assert torch.equal(adapter.A, A)
    delta = adapter.delta(torch.float64)
    outside = delta - delta @ torch.linalg.pinv(A) @ A
    assert outside.norm() <= 1e-12 * delta.norm()


def corrected(adapter: Any, model: nn.Module) -> Tensor:
    """The gradient of B that the optimizer would see."""
    optimizer = torch.optim.SGD([adapter.B], lr=0.0)
    Correction(model, "default").before_step(Step(optimizer, 1))
    return adapter.B.grad


def gradient(model: Any, x: Tensor) -> Tensor:
    """dL/dW of L = Σ y·cos(y), by hand, with B.grad filled on the way."""
    y = model(x)
    y.retain_grad()
    (y * y.cos()).sum().backward()
    return y.grad.mT @ x


@settings(deadline=None, max_examples=15, derandomize=True)
@given(rank=st.integers(1, 9), alpha=st.floats(0.25, 64), seed=st.integers(0, 99))
def test_the_corrected_step_is_the_projection_of_the_full_one_on_the_rows_of_A(rank, alpha, seed):
    model, adapter = adapted(rank=rank, alpha=alpha, seed=seed)
    G = gradient(model, torch.randn(ROWS, IN, dtype=torch.float64))
    step = adapter.scale.double() * corrected(adapter, model) @ adapter.A
    onto = torch.linalg.pinv(adapter.A) @ adapter.A
    smallest = torch.linalg.matrix_norm(adapter.A, -2) ** 2
    # what 1e-8 on the Gram matrix changes, and rounding
    torch.testing.assert_close(step, G @ onto, rtol=0, atol=float(2e-8 / smallest + 1e-12) * float(G.norm()))


def test_with_orthonormal_rows_and_scale_one_the_correction_changes_nothing():
    model, adapter = adapted(alpha=RANK)
    adapter.A.copy_(torch.linalg.qr(torch.randn(IN, RANK, dtype=torch.float64))[0].mT)
    gradient(model, torch.randn(ROWS, IN, dtype=torch.float64))
    before = adapter.B.grad.clone()
    torch.testing.assert_close(corrected(adapter, model), before, rtol=2e-8, atol=0)


def test_the_inverse_is_computed_once_and_anew_when_A_is_loaded(monkeypatch):
    calls = []

    def counted(matrix: Tensor) -> Tensor:
        calls.append(matrix)
        return inverse(matrix)

    monkeypatch.setattr(lora_fa, "inverse", counted)
    model, _ = adapted()
    optimizer = lrcompile.optimizer(model, torch.optim.SGD, lr=1e-3)
    for _ in range(3):
        gradient(model, torch.randn(ROWS, IN, dtype=torch.float64))
        optimizer.step()
    assert len(calls) == 1
    model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()})
    gradient(model, torch.randn(ROWS, IN, dtype=torch.float64))
    optimizer.step()
    assert len(calls) == 2


def test_the_correction_agrees_with_PEFTs_optimizer():
    """Right in PEFT, whose product runs in bfloat16 where that exists: hence the tolerance."""
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_lorafa_optimizer

    model, adapter = adapted(dtype=torch.float32)
    theirs = peft.get_peft_model(
        nn.Sequential(nn.Linear(IN, OUT)), peft.LoraConfig(r=RANK, lora_alpha=7, target_modules=["0"])
    )
    layer: Any = theirs.base_model.model[0]
    with torch.no_grad():
        layer.base_layer.load_state_dict({k: v for k, v in model[0].state_dict().items() if "lrcompile" not in k})
        layer.lora_A["default"].weight.copy_(adapter.A)
        layer.lora_B["default"].weight.copy_(adapter.B)
    x = torch.randn(ROWS, IN)
    ours = lrcompile.optimizer(model, torch.optim.AdamW, lr=1e-2, eps=1e-6, weight_decay=0.0)
    other = create_lorafa_optimizer(theirs, r=RANK, lora_alpha=7, lr=1e-2)
    start = adapter.B.detach().clone()
    for _ in range(3):
        for m, optimizer in ((model, ours), (theirs, other)):
            optimizer.zero_grad()
            m(x).square().mean().backward()
            optimizer.step()
    moved = (adapter.B - start).norm()
    # bfloat16 rounds the gradient by 2⁻⁹ a term; where a sum of them nearly cancels Adam's sign may turn
    assert (adapter.B - layer.lora_B["default"].weight).norm() <= 0.05 * moved


def test_experts_are_corrected_each_by_its_own_A():
    A = torch.randn(4, RANK, IN, dtype=torch.float64)
    each = torch.stack([inverse(gram(one)) for one in A])
    torch.testing.assert_close(inverse(gram(A)), each, rtol=1e-12, atol=1e-14)


def test_an_embedding_starts_with_drawn_rows_since_a_frozen_zero_would_never_learn():
    model: Any = nn.Sequential(nn.Embedding(19, OUT), nn.Linear(OUT, 3))
    lrcompile.apply(model, lrcompile.spec("lora-fa", rank=RANK, targets=["0"], seed=0))
    adapter = model[0].lrcompile_adapters["weight"]["default"]
    assert not adapter.B.any()
    assert adapter.A.count_nonzero() == adapter.A.numel()
    optimizer = lrcompile.optimizer(model, torch.optim.SGD, lr=0.1)
    ids = torch.tensor([1, 4, 4, 7])
    before = model(ids).square().mean()
    before.backward()
    optimizer.step()
    assert model(ids).square().mean() < before


def test_the_correction_can_be_left_out():
    steps = []
    for correction in (True, False):
        model, adapter = adapted(correction=correction)
        model[0].weight.data.fill_(0.01)
        start = adapter.B.detach().clone()
        optimizer = lrcompile.optimizer(model, torch.optim.SGD, lr=1.0)
        model(torch.ones(ROWS, IN, dtype=torch.float64)).sum().backward()
        plain = adapter.B.grad.clone()
        optimizer.step()
        steps.append(start - adapter.B.detach())
    torch.testing.assert_close(steps[1], plain, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(steps[0], plain)


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_correction_is_a_switch(value):
    with pytest.raises(lrcompile.SpecError, match="correction"):
        lrcompile.spec("lora-fa", correction=value)
