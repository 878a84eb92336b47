"""A model walked in one list is what torch's own generators give, with or without what lrcompile has put there."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import lrcompile
from lrcompile.errors import AdapterError
from lrcompile.walking import buffers, every_name, modules, parameters, submodule


class Shared(nn.Module):
    """A module under two names, the second outside and later; a tied parameter and buffer, and Nones."""

    def __init__(self) -> None:
        super().__init__()
        inner = nn.Linear(3, 3)
        self.outer = nn.Sequential(nn.BatchNorm1d(3), nn.Sequential(inner, nn.Tanh()))
        self.again = inner
        self.tied = nn.Linear(3, 3, bias=False)
        self.tied.weight = inner.weight
        self.left = None
        self.register_module("nothing", None)
        mask = torch.ones(2)
        self.register_buffer("mask", mask)
        self.register_buffer("same", mask)
        self.register_buffer("none", None)
        self.raw = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.tied(self.again(self.outer(x)))


def with_adapters() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)))
    return lrcompile.apply(model, lrcompile.spec("vera", rank=2))


MODELS = {"shared": Shared, "adapted": with_adapters, "single": lambda: nn.Linear(2, 3)}


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_walking_gives_what_torch_gives_in_its_order(build):
    model = build()
    assert modules(model) == list(model.named_modules())
    assert [(n, id(p)) for n, p in parameters(model)] == [(n, id(p)) for n, p in model.named_parameters()]
    assert [(n, id(b)) for n, b in buffers(model)] == [(n, id(b)) for n, b in model.named_buffers()]


def test_without_adapters_it_gives_what_the_base_had():
    model = with_adapters()
    own = lambda pairs: [name for name, _ in pairs if "lrcompile_adapters" not in name.split(".")]  # noqa: E731
    assert [name for name, _ in modules(model, adapters=False)] == own(model.named_modules())
    assert [name for name, _ in parameters(model, adapters=False)] == own(model.named_parameters())
    assert [name for name, _ in buffers(model, adapters=False)] == own(model.named_buffers())
    assert len(parameters(model)) > len(parameters(model, adapters=False))


def test_every_name_of_a_module_is_known_the_first_one_first():
    model = Shared()
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    assert list(every_name(model).items()) == list(names.items())
    assert every_name(model)[model.again] == ["outer.1.0", "again"]


def test_a_module_is_found_by_the_name_it_goes_by():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 3)), nn.Tanh())
    for name, module in model.named_modules():
        assert submodule(model, name) is module


@pytest.mark.parametrize("name", ["2", "0.weight", "0.0.weight", "forward"])
def test_a_name_that_no_module_goes_by_is_said(name):
    with pytest.raises(AdapterError, match=re.escape(repr(name))):
        submodule(nn.Sequential(nn.Sequential(nn.Linear(2, 3))), name)
