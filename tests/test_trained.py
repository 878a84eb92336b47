"""Parameters trained in full: every adapter has its own values, and the base keeps its bits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import lrcompile
from lrcompile.errors import AdapterError
from lrcompile.trained import Trained


def model() -> Any:
    return nn.ModuleDict({"body": nn.Linear(5, 4), "head": nn.Linear(4, 3), "norm": nn.LayerNorm(4)})


def step(m: Any, by: float) -> None:
    """As an optimizer would: in place, on what trains."""
    with torch.no_grad():
        for p in m.parameters():
            if p.requires_grad:
                p.add_(by)


def spec(**fields):
    return lrcompile.spec("lora", **{"rank": 2, "targets": ["body"], "train_modules": ["head"]} | fields)


def test_each_adapter_has_its_own_values_and_the_base_its_bits():
    m = model()
    head, bits, parameter = m["head"], m["head"].weight.detach().clone(), m["head"].weight
    lrcompile.apply(m, spec(), name="a")
    assert {n for n, p in m.named_parameters() if p.requires_grad and "lrcompile" not in n} == {
        "head.weight",
        "head.bias",
    }
    step(m, 1.0)
    lrcompile.apply(m, spec(), name="b")
    assert torch.equal(head.weight, bits)
    step(m, 2.0)
    for active, by in (("a", 1.0), ("b", 2.0), ([], 0.0), ("a", 1.0)):
        lrcompile.activate(m, active)
        torch.testing.assert_close(head.weight, bits + by)
    with lrcompile.disabled(m):
        assert torch.equal(head.weight, bits)
    torch.testing.assert_close(head.weight, bits + 1)
    lrcompile.remove(m)
    assert torch.equal(head.weight, bits)
    assert head.weight is parameter


def test_an_optimizer_keeps_training_the_same_parameter_objects():
    m = model()
    lrcompile.apply(m, spec())
    optimizer = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1)
    with lrcompile.disabled(m):
        pass
    before = m["head"].weight.detach().clone()
    m["head"](m["body"](torch.randn(3, 5))).sum().backward()
    optimizer.step()
    assert not torch.equal(m["head"].weight, before)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_train_and_are_put_back(bias):
    m = model()
    bits = {n: p.detach().clone() for n, p in m.named_parameters()}
    lrcompile.apply(m, spec(bias=bias, train_modules=[]))
    trained = {n for n, p in m.named_parameters() if p.requires_grad and "lrcompile" not in n}
    assert trained == ({"body.bias"} if bias == "lora_only" else {"body.bias", "head.bias", "norm.bias"})
    step(m, 1.0)
    lrcompile.remove(m)
    assert all(torch.equal(p, bits[n]) for n, p in m.named_parameters())


def test_merging_keeps_the_trained_values_and_final_makes_them_the_only_ones():
    m = model()
    bits = m["head"].weight.detach().clone()
    lrcompile.apply(m, spec())
    step(m, 1.0)
    lrcompile.merge(m)
    torch.testing.assert_close(m["head"].weight, bits + 1)
    with lrcompile.disabled(m):
        assert torch.equal(m["head"].weight, bits)
    lrcompile.unmerge(m)
    torch.testing.assert_close(m["head"].weight, bits + 1)
    lrcompile.merge(m, final=True)
    torch.testing.assert_close(m["head"].weight, bits + 1)


def test_copies_have_values_of_their_own():
    m = model()
    lrcompile.apply(m, spec())
    step(m, 1.0)
    other = copy.deepcopy(m)
    step(other, 5.0)
    lrcompile.remove(m)
    with lrcompile.disabled(other):
        assert torch.equal(other["head"].weight, m["head"].weight)
    torch.testing.assert_close(other["head"].weight, m["head"].weight + 6)


def test_a_cast_reaches_the_values_out_of_place_too():
    m = model()
    lrcompile.apply(m, spec())
    step(m, 1.0)
    m.double()
    with lrcompile.disabled(m):
        assert m["head"].weight.dtype == torch.float64
        m["head"](torch.randn(2, 4, dtype=torch.float64))


def test_values_can_be_read_and_written_wherever_they_lie():
    m, trained = model(), Trained()
    trained.add(m, "a", ["head.bias"])
    for show in ((), ("a",)):
        trained.show(m, show)
        value = torch.randn(3)
        trained.write(m, "a", "head.bias", value)
        assert torch.equal(trained.value(m, "a", "head.bias"), value)
        assert torch.equal(m["head"].bias, value) is bool(show)
    assert trained.names_of("a") == ("head.bias",)
    assert trained.names_of("b") == ()


def test_a_conflict_is_refused_before_anything_moves():
    m, trained = model(), Trained()
    trained.add(m, "a", ["head.bias"])
    trained.add(m, "b", ["head.bias", "norm.bias"])
    trained.show(m, ["a"])
    before = {n: p.data_ptr() for n, p in m.named_parameters()}
    with pytest.raises(AdapterError, match=r"'b' and 'a' both train 'head\.bias'"):
        trained.show(m, ["b", "a"])
    assert before == {n: p.data_ptr() for n, p in m.named_parameters()}
