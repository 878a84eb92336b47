"""LoRA+ (methods_dense 2.3): B, and what is one-dimensional, learns `lr_ratio` times as fast as A."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lrcompile


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(17, 9)
        self.norm = nn.LayerNorm(9)
        self.a, self.b = nn.Linear(9, 7), nn.Linear(7, 5)

    def forward(self, ids):
        return self.b(torch.tanh(self.a(self.norm(self.words(ids)))))


def adapted(method="lora+", seed=0, **fields) -> Any:
    torch.manual_seed(seed)
    fields = {"rank": 3, "alpha": 6, "targets": ["a", "b"], "seed": seed} | fields
    model = lrcompile.apply(Model().double(), lrcompile.spec(method, **fields))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("default.B"):
                tensor.normal_(0, 0.1)
    return model


def train(model, optimizer, steps=1):
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randint(17, (6,), generator=generator)).square().mean().backward()
        optimizer.step()


def rates(model, optimizer) -> dict[str, tuple[float, float]]:
    """By parameter name: learning rate and weight decay."""
    names = {id(tensor): name for name, tensor in model.named_parameters()}
    return {
        names[id(tensor)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for tensor in group["params"]
    }


EVERYTHING = {"targets": ["a", "b", "words"], "bias": "all", "train_modules": ["norm"], "lr_ratio": 8.0}


def test_groups_hold_every_trainable_exactly_once():
    model = adapted(**EVERYTHING)
    optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=1e-2)
    held = [id(tensor) for group in optimizer.param_groups for tensor in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(tensor) for tensor in model.parameters() if tensor.requires_grad}


def test_who_learns_how_fast_and_decays():
    model = adapted(**EVERYTHING, embedding_lr=1e-5)
    found = rates(model, lrcompile.optimizer(model, torch.optim.AdamW, lr=1e-2, weight_decay=0.1))
    at = "{}.lrcompile_adapters.weight.default.{}".format
    slow, fast, undecayed = (1e-2, 0.1), (8e-2, 0.1), (8e-2, 0.0)
    assert found == {
        at("a", "A"): slow,
        at("b", "A"): slow,
        at("a", "B"): fast,
        at("b", "B"): fast,
        at("words", "A"): (1e-5, 0.1),
        at("words", "B"): (1e-5, 0.1),
        "a.bias": undecayed,
        "b.bias": undecayed,
        "norm.weight": undecayed,
        "norm.bias": undecayed,
    }


def test_a_matrix_trained_in_full_learns_as_fast_as_A():
    model = adapted(targets=["a"], train_modules=["b"])
    found = rates(model, lrcompile.optimizer(model, torch.optim.AdamW, lr=1e-2))
    assert found["b.weight"][0] == 1e-2
    assert found["b.bias"][0] == pytest.approx(16e-2)


def test_B_is_known_by_the_form_not_by_a_name():
    class Misleading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lora_B = nn.Linear(5, 4)

        def forward(self, x):
            return self.lora_B(x)

    model = lrcompile.apply(Misleading(), lrcompile.spec("lora+", rank=2))
    optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=1e-3)
    assert sorted(group["lr"] for group in optimizer.param_groups) == pytest.approx([1e-3, 16e-3])


def test_with_ratio_one_and_no_decay_the_trajectory_is_that_of_one_group_to_the_bit():
    ends = []
    for method, fields in (("lora+", {"lr_ratio": 1.0}), ("lora", {})):
        model = adapted(method, bias="all", **fields)
        train(model, lrcompile.optimizer(model, torch.optim.AdamW, lr=1e-2, weight_decay=0.0), steps=5)
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@settings(deadline=None, max_examples=10, derandomize=True)
@given(ratio=st.floats(1, 100))
def test_one_step_of_SGD_scales_the_change_of_B_by_the_ratio_and_leaves_that_of_A(ratio):
    changes = []
    for value in (1.0, ratio):
        model = adapted(lr_ratio=value)
        adapter = model.a.lrcompile_adapters["weight"]["default"]
        before = adapter.A.detach().clone(), adapter.B.detach().clone()
        train(model, lrcompile.optimizer(model, torch.optim.SGD, lr=1e-2))
        changes.append((adapter.A.detach() - before[0], adapter.B.detach() - before[1]))
    assert torch.equal(changes[0][0], changes[1][0])
    rounding = 4 * torch.finfo(torch.float64).eps * adapter.B.abs().max()
    assert (changes[1][1] - ratio * changes[0][1]).abs().max() <= ratio * rounding


@pytest.mark.parametrize("make", [
    lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step),
    lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
])  # fmt: skip
def test_a_scheduler_scales_every_group(make):
    model = adapted(**EVERYTHING)
    optimizer = lrcompile.optimizer(model, torch.optim.AdamW, lr=1e-2)
    before = [group["lr"] for group in optimizer.param_groups]
    scheduler = make(optimizer)
    train(model, optimizer)
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([rate / 2 for rate in before])


def test_only_its_own_adapter_is_split_off():
    model = adapted("lora", targets=["a"])
    lrcompile.apply(model, lrcompile.spec("lora+", rank=2, targets=["b"]), name="plus")
    lrcompile.activate(model, ["default", "plus"], train=["default", "plus"])
    found = rates(model, lrcompile.optimizer(model, torch.optim.AdamW, lr=1e-2))
    assert found["a.lrcompile_adapters.weight.default.B"][0] == 1e-2
    assert found["b.lrcompile_adapters.weight.plus.B"][0] == pytest.approx(16e-2)


@pytest.mark.parametrize("field", [{"lr_ratio": 0.5}, {"lr_ratio": True}, {"embedding_lr": 0.0}])
def test_a_ratio_below_one_and_no_rate_are_refused(field):
    with pytest.raises(lrcompile.SpecError, match=next(iter(field))):
        lrcompile.spec("lora+", **field)
