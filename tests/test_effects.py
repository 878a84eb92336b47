"""effect: what a change of a weight, or of what its layer puts out, has of the change that was meant."""

from __future__ import annotations

import math
from dataclasses import astuple

import pytest
import torch

from lrcompile.effects import Effect, effect, effect_on_outputs


def test_the_numbers_are_those_of_the_two_changes_as_vectors():
    made, meant = torch.randn(5, 7), torch.randn(5, 7)
    found = effect(made, meant)
    one, other = made.double().flatten(), meant.double().flatten()
    assert found.share == pytest.approx(float(one @ other / other.square().sum()), rel=1e-12)
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(one, other, 0)), rel=1e-12)
    assert found.error == pytest.approx(float((one - other).norm() / other.norm()), rel=1e-12)


def test_second_moments_make_it_the_change_of_the_outputs():
    x, made, meant = (torch.randn(size, dtype=torch.float64) for size in ((40, 7), (5, 7), (5, 7)))
    weighted, outputs = effect(made, meant, x.T @ x / len(x)), effect(x @ made.T, x @ meant.T)
    for name in ("share", "cosine", "error"):
        assert getattr(weighted, name) == pytest.approx(getattr(outputs, name), rel=1e-10)


@pytest.mark.parametrize(("made", "share", "cosine", "error"), [(1.0, 1, 1, 0), (0.0, 0, 0, 1), (-2.0, -2, -1, 3)])
def test_all_nothing_and_the_opposite(made, share, cosine, error):
    meant = torch.randn(3, 4)
    found = effect(made * meant, meant)
    assert (found.share, found.cosine, found.error) == pytest.approx((share, cosine, error), abs=1e-7)


def test_where_nothing_was_meant_nothing_is_missing():
    assert effect(torch.randn(3, 4), torch.zeros(3, 4)).error == 0


def test_a_change_that_overflowed_is_no_small_error():
    made, meant = torch.ones(2, 2), torch.ones(2, 2)
    made[0, 0] = torch.inf
    assert not effect(made, meant).error <= 1e9
    assert not effect(made, meant, torch.eye(2)).error <= 1e9


def test_the_effect_on_outputs_in_parts_is_that_of_their_whole():
    before, meant, made = (torch.randn(30) for _ in range(3))
    whole = effect(made - before, meant - before)
    parts = effect_on_outputs(before.split(7), iter(meant.split(7)), iter(made.split(7)))
    assert astuple(parts) == pytest.approx(astuple(whole), rel=1e-6)
    assert effect_on_outputs([before], [before], [made]) == Effect(1.0, 1.0, 0.0)
    assert math.isnan(effect_on_outputs([before], [meant * torch.nan], [made]).error)
