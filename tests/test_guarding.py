"""An optimizer that would leave a method's steps out is refused at its first step, and no other is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from zoo.every_method import METHODS, applied, batches, optimizer_of, train

import lrcompile
from lrcompile.recipes import recipe

RULED = [name for name in METHODS if recipe(name).rules]


def step(model: Any, optimizer: torch.optim.Optimizer) -> None:
    model.train()
    optimizer.zero_grad()
    model(**batches(1)[0]).loss.backward()
    optimizer.step()


def plain(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


@pytest.mark.parametrize("method", RULED)
def test_a_plain_optimizer_is_refused_before_it_changes_anything(method):
    model = applied(method)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(lrcompile.AdapterError, match=rf"{method.replace('+', '.')} acts .* lrcompile.optimizer"):
        step(model, plain(model))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_copy_is_guarded_too():
    model = copy.deepcopy(applied("adalora"))
    with pytest.raises(lrcompile.AdapterError, match="adalora acts"):
        step(model, plain(model))


def test_a_loaded_adapter_is_guarded_too(tmp_path):
    from zoo.every_method import base

    lrcompile.save(applied("adalora"), tmp_path / "adapter")
    model = lrcompile.load(base(), tmp_path / "adapter", trainable=True)
    with pytest.raises(lrcompile.AdapterError, match="adalora acts"):
        step(model, plain(model))


def test_methods_without_steps_of_their_own_train_with_any_optimizer():
    for method in ("lora", "dora", "vera", "pissa"):
        model = applied(method)
        step(model, plain(model))


def test_another_adapter_beside_a_guarded_one_trains_with_any_optimizer():
    model = applied("adalora")
    lrcompile.apply(model, lrcompile.spec("lora", rank=2, targets=["up"]), name="other")
    step(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_the_right_optimizer_and_its_copies_of_state_are_never_asked():
    model = applied("adalora")
    optimizer = optimizer_of("adalora", model)
    train(model, optimizer, batches(2))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, batches(1))


@pytest.mark.parametrize("method", ["adalora", "lora-drop", "delta-lora", "galore"])
def test_a_step_without_a_gradient_of_the_adapter_is_none_of_its_schedule(method):
    model = applied(method)
    optimizer = optimizer_of(method, model)
    train(model, optimizer, batches(1))
    optimizer.zero_grad()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(3):
        optimizer.step()
    assert optimizer.param_groups[0]["lrcompile_steps"] == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
