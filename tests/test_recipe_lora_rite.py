"""LoRA-RITE (arXiv 2410.20625): how A and B share BA makes no difference to its trajectory."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrcompile
from lrcompile import LoraRite


def pair(inside=11, out=7, rank=3, lead: tuple[int, ...] = (), zero=False) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*lead, *shape, generator=g, dtype=torch.float64)  # noqa: E731
    A, B = draw(rank, inside), draw(out, rank)
    return A, torch.zeros_like(B) if zero else B


def trajectory(A: Tensor, B: Tensor, make, steps=8) -> Tensor:
    """BA after each step towards a target, with another batch each time."""
    A, B = nn.Parameter(A.clone()), nn.Parameter(B.clone())
    optimizer = make(A, B)
    g = torch.Generator().manual_seed(1)
    target = torch.randn(*(B @ A).shape, generator=g, dtype=torch.float64)
    found = []
    for _ in range(steps):
        x = torch.randn(20, A.shape[-1], generator=g, dtype=torch.float64)
        optimizer.zero_grad()
        ((x @ A.mT) @ B.mT - x @ target.mT).square().mean().backward()
        optimizer.step()
        found.append((B @ A).detach())
    return torch.stack(found)


def rite(A: Tensor, B: Tensor, **fields: Any) -> LoraRite:
    return LoraRite([{"params": [A, B], "pairs": True}], **{"lr": 0.05, **fields})


def adam(A: Tensor, B: Tensor) -> torch.optim.Optimizer:
    return torch.optim.AdamW([A, B], lr=0.05)


def mixing(rank=3, size=1.0) -> Tensor:
    """Invertible, far from orthogonal: its singular values differ by a factor of 100."""
    g = torch.Generator().manual_seed(2)
    U, _, V = torch.linalg.svd(torch.randn(rank, rank, generator=g, dtype=torch.float64))
    return size * U @ torch.logspace(-1, 1, rank, dtype=torch.float64).diag() @ V


OPTIONS: list[dict[str, Any]] = [
    {},
    {"escape": True},
    {"max_norm": None},
    {"max_norm": 1e-3},
    {"weight_decay": 0.1},
    {"betas": (0.0, 0.0)},
]


@pytest.mark.parametrize("fields", OPTIONS, ids=str)
@pytest.mark.parametrize("lead", [(), (4,)], ids=["one map", "a stack"])
@pytest.mark.parametrize("zero", [False, True], ids=["B drawn", "B = 0"])
def test_the_trajectory_of_BA_is_that_of_every_other_factorisation(fields, lead, zero):
    A, B = pair(lead=lead, zero=zero)
    R = mixing()
    make = functools.partial(rite, **fields)
    first = trajectory(A, B, make)
    second = trajectory(R @ A, B @ torch.linalg.inv(R), make)
    assert (first[-1] - first[0]).norm() > 1e-3
    torch.testing.assert_close(second, first, rtol=0, atol=1e-8 * float(first.abs().max()))


def test_adams_is_not():
    A, B = pair()
    R = mixing()
    first, second = trajectory(A, B, adam), trajectory(R @ A, B @ torch.linalg.inv(R), adam)
    assert (second[-1] - first[-1]).norm() > 0.1 * (first[-1] - first[0]).norm()


def test_scaling_alone_makes_no_difference_either():
    A, B = pair()
    torch.testing.assert_close(trajectory(1e3 * A, B / 1e3, rite), trajectory(A, B, rite), rtol=0, atol=1e-7)


def test_at_rank_one_in_one_dimension_it_converges():
    """W = ba; the loss (ba − 3)² from ba = 0."""
    a, b = nn.Parameter(torch.tensor([[1e-3]])), nn.Parameter(torch.tensor([[0.0]]))
    optimizer = rite(a, b, lr=0.05)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 300)
    for _ in range(300):
        optimizer.zero_grad()
        (b @ a - 3).square().sum().backward()
        optimizer.step()
        scheduler.step()
    assert float(b @ a) == pytest.approx(3, abs=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_a_batch_smaller_than_the_rank_does_not_blow_it_up(tokens, dtype):
    """Gradients are then of rank `tokens`, and B holds but rounding in its other directions."""
    torch.manual_seed(0)
    layers = (nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 14))
    model = lrcompile.apply(nn.Sequential(*layers).to(dtype), lrcompile.spec("lora-rite", rank=4, alpha=8))
    optimizer = lrcompile.optimizer(model, LoraRite, lr=1e-2)
    x, y = torch.randn(tokens, 12).to(dtype), torch.randn(tokens, 14).to(dtype)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 1e-2 * losses[0]


def test_the_first_step_of_B_is_a_step_of_the_size_of_adams():
    """After one step second moment and gradient cancel: every direction moves by lr in the orthonormal basis."""
    A, B = pair(zero=True)
    A, B = torch.linalg.qr(A.mT)[0].mT.contiguous(), B
    first = nn.Parameter(A), nn.Parameter(B)
    optimizer = rite(*first, lr=0.1, eps=1e-12)
    first[1].grad, first[0].grad = torch.randn(7, 3, dtype=torch.float64), torch.zeros_like(A)
    optimizer.step()
    torch.testing.assert_close(first[1].mT @ first[1] / 7, 0.01 * torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-9)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(11, 7), nn.Linear(7, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))


def adapted(**fields: Any) -> Any:
    torch.manual_seed(0)
    fields = {"rank": 2, "targets": ["a", "b"], "train_modules": ["head"], "bias": "all", "seed": 0} | fields
    return lrcompile.apply(Model(), lrcompile.spec("lora-rite", **fields))


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int, start=0) -> None:
    for step in range(start, start + steps):
        g = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(16, 11, generator=g)).sub(1).square().mean().backward()
        optimizer.step()


def test_the_rule_hands_over_pairs_and_leaves_the_rest_to_adamw():
    model = adapted()
    optimizer = lrcompile.optimizer(model, LoraRite, lr=1e-2)
    pairs = [group["params"] for group in optimizer.param_groups if group["pairs"]]
    adapters = [getattr(model, name).lrcompile_adapters["weight"]["default"] for name in ("a", "b")]
    assert [id(p) for group in pairs for p in group] == [id(f) for each in adapters for f in (each.A, each.B)]
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in model.parameters() if p.requires_grad}
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    train(model, optimizer, 2)
    assert not any(torch.equal(p, b) for p, b in zip(trained, before, strict=True))


def test_what_is_no_pair_gets_adamw():
    ends = []
    for make in (
        lambda w, A, B: LoraRite(
            [{"params": [w], "weight_decay": 0.1, "eps": 1e-8}, {"params": [A, B], "pairs": True}], lr=1e-2
        ),
        lambda w, A, B: torch.optim.AdamW([w], lr=1e-2, weight_decay=0.1),
    ):
        A, B = (nn.Parameter(t) for t in pair())
        w = nn.Parameter(torch.linspace(-1, 1, 6, dtype=torch.float64))
        optimizer = make(w, A, B)
        for step in range(6):
            w.grad = torch.randn(6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            optimizer.step()
        ends.append(w.detach())
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    ends = []
    for interrupted in (False, True):
        model = adapted()
        optimizer = lrcompile.optimizer(model, LoraRite, lr=1e-2, escape=True)
        train(model, optimizer, 3)
        if interrupted:
            torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
            model = adapted()
            optimizer = lrcompile.optimizer(model, LoraRite, lr=1e-2, escape=True)
            states = torch.load(tmp_path / "state.pt", weights_only=True)
            model.load_state_dict(states[0])
            optimizer.load_state_dict(states[1])
        train(model, optimizer, 3, start=3)
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_all_its_state_is_tensors():
    optimizer = lrcompile.optimizer(model := adapted(), LoraRite, lr=1e-2)
    train(model, optimizer, 1)
    assert all(isinstance(value, Tensor) for state in optimizer.state.values() for value in state.values())


@pytest.mark.parametrize(
    "cls",
    [torch.optim.AdamW, functools.partial(torch.optim.AdamW, eps=1e-6), lambda groups, lr: torch.optim.SGD(groups, lr)],
    ids=["class", "partial", "function"],
)
def test_another_optimizer_is_refused_by_name(cls):
    with pytest.raises(lrcompile.AdapterError, match=r"lrcompile\.LoraRite instead of (AdamW|SGD)"):
        lrcompile.optimizer(adapted(), cls, lr=1e-2)


def test_it_is_taken_with_options_and_through_a_function():
    for cls in (functools.partial(LoraRite, escape=True), lambda groups, lr: LoraRite(groups, lr)):
        train(model := adapted(), lrcompile.optimizer(model, cls, lr=1e-2), 1)


def test_without_pairs_it_is_refused_as_it_would_be_adamw():
    model = lrcompile.apply(nn.Linear(5, 4), lrcompile.spec("lora", rank=2))
    with pytest.raises(lrcompile.AdapterError, match="no pairs of factors"):
        lrcompile.optimizer(model, LoraRite, lr=1e-2)


@pytest.mark.parametrize(
    "fields",
    [
        {"lr": -1.0},
        {"betas": (0.9, 1.0)},
        {"eps": 0.0},
        {"weight_decay": -0.1},
        {"max_norm": 0.0},
        {"lr": float("nan")},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(fields):
    with pytest.raises(lrcompile.AdapterError, match="LoraRite takes"):
        rite(*(nn.Parameter(t) for t in pair()), **fields)


def test_half_precision_and_unequal_ranks_are_refused():
    with pytest.raises(lrcompile.AdapterError, match="float32 or float64"):
        lrcompile.optimizer(adapted(dtype="bfloat16"), LoraRite, lr=1e-2)
    A, B = pair()
    with pytest.raises(lrcompile.AdapterError, match="a pair is A"):
        rite(nn.Parameter(A), nn.Parameter(B[:, :2].contiguous()))


def test_a_pair_without_gradients_stays_as_it_is():
    A, B = (nn.Parameter(t) for t in pair())
    optimizer = rite(A, B)
    optimizer.step()
    assert torch.equal(A, pair()[0])
    assert not optimizer.state[A]
