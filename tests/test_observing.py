"""Outputs on a user's data: every floating one but padding and caches, and no trace of the look."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lrcompile
from lrcompile.observing import Observed


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop = nn.Linear(3, 2), nn.Dropout(0.5)

    def forward(self, x, attention_mask=None):
        y = self.layer(self.drop(x))
        return {"y": y, "pooled": y.sum(1), "past_key_values": [y], "best": y.argmax(-1)}


def batch(rows: int) -> dict[str, Any]:
    mask = torch.ones(rows, 4, dtype=torch.long)
    mask[0, 2:] = 0
    return {"x": torch.randn(rows, 4, 3), "attention_mask": mask}


def test_padding_caches_and_integers_do_not_count_and_the_model_is_left_in_training():
    model, data = Model().train(), [batch(2), batch(3)]
    found = list(Observed(model, iter(data)).outputs())
    expected = []
    for each in data:
        y = model.layer(each["x"]).detach()
        expected += [y[each["attention_mask"].bool()].flatten(), y.sum(1).flatten()]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert model.training
    assert model.drop.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_without_a_mask_everything_counts():
    model = Model()
    y, pooled = Observed(model, [{"x": torch.randn(2, 4, 3)}]).outputs()
    assert (y.numel(), pooled.numel()) == (16, 4)


@pytest.mark.parametrize(("data", "message"), [([], "no batch"), ({"x": 1}, "single batch"), ([{"z": 1}], "takes x")])
def test_data_that_the_model_does_not_take_is_refused_before_it_runs(data, message):
    with pytest.raises(lrcompile.SpecError, match=message):
        Observed(Model(), data)
