"""Modules that use their weights in awkward ways: an adapter acts where its weight acts, or `apply` refuses by name."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from zoo.awkward import CASES, Case
from zoo.conformance import check, refused_cleanly

import lrcompile


def _spec(case: Case) -> lrcompile.Spec:
    return lrcompile.spec("lora", rank=3, alpha=5, seed=0, targets=case.targets)


def _ids(cases: list[Case]) -> list:
    return [pytest.param(case, id=case.name) for case in cases]


def test_there_are_at_least_twenty_ways():
    assert len({case.name for case in CASES}) == len(CASES) >= 20


@pytest.mark.parametrize("case", _ids([case for case in CASES if not case.refused]))
def test_the_adapter_acts_exactly_where_its_weight_acts(case: Case):
    outcome = check(case.build, _spec(case), exports=case.exports)
    assert not outcome.refusal
    assert not outcome.failures
    assert outcome.sites


@pytest.mark.parametrize("case", _ids([case for case in CASES if case.refused]))
def test_a_weight_no_adapter_can_follow_is_refused_by_name_and_reason(case: Case):
    message = refused_cleanly(case.build, _spec(case))
    assert re.search(case.refused, message, re.DOTALL), message


def test_an_empty_batch_passes_through_an_adapted_model():
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4))
    lrcompile.apply(model, lrcompile.spec("lora", rank=2, alpha=3))
    y = model(torch.empty(0, 5))
    y.sum().backward()
    assert y.shape == (0, 4)


def test_a_model_on_the_meta_device_is_adapted_without_memory():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(500_000, 700_000), nn.Linear(700_000, 40))
    lrcompile.apply(model, lrcompile.spec("lora", rank=2, alpha=3))
    factors = [p for name, p in model.named_parameters() if "lrcompile_adapters" in name]
    assert len(factors) == 4
    assert all(p.is_meta and p.requires_grad for p in factors)
    assert model(torch.empty(3, 500_000, device="meta")).shape == (3, 40)
