"""What NF4 and integer storage share: codes only move, a failed cast leaves them, and the weight comes back."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import lrcompile
from lrcompile.allocating import integers_as
from lrcompile.coded import CodedLinear, coded_layout, detach_coded, is_coded
from lrcompile.integers.modules import attach_integers

FORMS = ("nf4", "nf4 in float32 maxima", "int8", "int4")


def coded(form: str) -> Any:
    torch.manual_seed(0)
    layer = nn.Linear(70, 33)
    if form.startswith("nf4"):
        model: Any = nn.Sequential(layer)
        lrcompile.quantize(model, targets=["0"], double_quant=form == "nf4")
    else:
        attach_integers(layer, *integers_as(layer, form))
    return layer


def parts(layer: Any) -> dict[str, torch.Tensor | None]:
    return {name: layer._buffers[name] for name in layer.PARTS}


def same(one: Any, other: Any) -> bool:
    mine, theirs = parts(one), parts(other)
    return all(
        (a is None and b is None) or (a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b))
        for a, b in zip(mine.values(), theirs.values(), strict=True)
    )


@pytest.mark.parametrize("form", FORMS)
def test_a_cast_changes_what_the_weight_answers_in_and_no_code_or_scale(form):
    layer, before = coded(form), coded(form)
    assert isinstance(layer, CodedLinear)
    assert isinstance(layer, nn.Linear)
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        layer.to(dtype)
        assert same(layer, before)
        assert layer.weight.dtype == layer.bias.dtype == coded_layout(layer).dtype == dtype
        assert layer(torch.randn(2, 70, dtype=dtype)).dtype == dtype
    assert torch.equal(layer.weight, before.weight)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert same(twin, before)
        assert str(twin) == str(layer)


@pytest.mark.parametrize("form", FORMS)
def test_a_move_that_fails_leaves_every_part(form):
    layer, before = coded(form), coded(form)

    def fails(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype == torch.uint8:
            raise RuntimeError("no room there")
        return tensor.double()

    with pytest.raises(RuntimeError, match="no room there"):
        layer._apply(fails)
    assert same(layer, before)
    assert coded_layout(layer).dtype == torch.float32
    assert torch.equal(layer.weight, before.weight)


@pytest.mark.parametrize("form", FORMS)
def test_what_was_attached_is_detached_to_the_class_there_was(form):
    layer, weight = coded(form), nn.Parameter(torch.randn(33, 70))
    detach_coded(layer, weight)
    assert type(layer) is nn.Linear
    assert not is_coded(layer)
    assert layer.weight is weight
    assert set(layer.state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize("form", FORMS)
def test_a_state_of_another_form_is_refused_and_not_cast(form):
    layer, before = coded(form), coded(form)
    for name, held in parts(layer).items():
        if held is not None:
            other = held.float() if held.dtype == torch.uint8 else held.half()
            with pytest.raises(RuntimeError, match="stored in another form"):
                layer.load_state_dict({**layer.state_dict(), name: other})
    assert same(layer, before)
