"""The adapter: y + s·(xAᵀ)Bᵀ with factors, scale and dropout where they belong."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lrcompile.adapters import RESERVED, AdapterSet, AdapterSlots
from lrcompile.errors import AdapterError
from lrcompile.recipes.forms.pair import LoraAdapter


def made(inside=7, out=5, rank=3, scale=0.3, dtype=torch.float64, **options) -> LoraAdapter:
    adapter = LoraAdapter(inside, out, rank, scale, dtype=dtype, **options)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(torch.randn(p.shape, dtype=torch.float64))
    return adapter


@settings(deadline=None, max_examples=25, derandomize=True)
@given(inside=st.integers(1, 9), out=st.integers(1, 9), rank=st.integers(1, 6), scale=st.floats(0.01, 100))
def test_the_update_is_s_B_A_of_the_forward_to_the_last_bits_of_float64(inside, out, rank, scale):
    adapter = made(inside, out, rank, scale)
    x = torch.eye(inside, dtype=torch.float64)
    forward = adapter(torch.zeros(inside, out, dtype=torch.float64), x).T
    size = scale * adapter.B.abs() @ adapter.A.abs()
    assert bool(((adapter.delta(torch.float64) - forward).abs() <= 8 * torch.finfo(torch.float64).eps * size).all())
    assert torch.linalg.matrix_rank(adapter.delta(torch.float64)) <= rank


def test_the_number_of_added_numbers_is_rank_times_in_plus_out():
    assert sum(p.numel() for p in made(7, 5, 3).parameters()) == 3 * (7 + 5)
    assert sum(p.numel() for p in made(7, 5, 3, copies=4).parameters()) == 4 * 3 * (7 + 5)


def test_doubling_the_scale_doubles_the_update_exactly():
    one, two = made(scale=0.3), made(scale=0.6)
    two.load_state_dict(one.state_dict())
    assert torch.equal(2 * one.delta(), two.delta())


def test_the_order_of_the_rank_index_does_not_matter():
    adapter, x = made(rank=5), torch.randn(4, 7, dtype=torch.float64)
    other, order = copy.deepcopy(adapter), torch.randperm(5)
    with torch.no_grad():
        other.A.copy_(adapter.A[order])
        other.B.copy_(adapter.B[:, order])
    y = torch.randn(4, 5, dtype=torch.float64)
    torch.testing.assert_close(adapter(y, x), other(y, x), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    "move", [nn.Module.half, nn.Module.double, nn.Module.bfloat16, lambda m: m.to("meta").to_empty(device="cpu")]
)
def test_no_cast_or_move_touches_the_scale(move):
    adapter = made(scale=1 / 3)
    adapter.weight = 0.5
    move(adapter)
    assert adapter.scale.dtype == torch.float32
    assert adapter.scale.item() == torch.tensor(1 / 6, dtype=torch.float32).item()


def test_the_scale_is_no_part_of_a_checkpoint():
    assert set(made().state_dict()) == {"A", "B"}


def test_dropout_acts_in_training_only():
    adapter, x, y = made(dropout=0.5), torch.randn(4, 7, dtype=torch.float64), torch.zeros(4, 5, dtype=torch.float64)
    assert not torch.equal(adapter(y, x), adapter(y, x))
    adapter.eval()
    assert torch.equal(adapter(y, x), adapter(y, x))


def test_rows_is_that_part_of_the_whole():
    adapter, x, y = made(), torch.randn(4, 7, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    torch.testing.assert_close(adapter.rows(y[:, 1:4], x, 1, 4), adapter(y, x)[:, 1:4])


def test_a_set_applies_the_active_ones_in_order_but_for_the_merged():
    adapters = AdapterSet()
    for name in "abc":
        adapters.attach(name, made())
    assert adapters.live == ()
    adapters.active, adapters.merged = ("c", "a"), ("a",)
    assert adapters.live == (adapters["c"],)
    adapters.detach("c")
    assert (adapters.active, list(adapters), len(adapters)) == (("a",), ["a", "b"], 2)
    with pytest.raises(AdapterError, match="'a'"):
        adapters.attach("a", made())


def test_every_name_that_would_hide_an_attribute_is_reserved():
    assert {"active", "merged", "live", "attach", "forward", "training", "parameters"} <= RESERVED
    assert "default" not in RESERVED


def test_slots_may_carry_any_name_a_parameter_can():
    slots = AdapterSlots()
    for name in ("keys", "values", "items", "pop", "update"):
        slots[name] = AdapterSet()
        assert slots.get_submodule(name) is slots[name]
    del slots["pop"]
    assert list(slots) == ["keys", "values", "items", "update"]
    assert "pop" not in slots
    assert len(slots) == 4


def test_it_prints_what_it_is():
    assert repr(made(scale=1.5, dropout=0.25)) == "LoraAdapter(in=7, out=5, rank=3, scale=1.5, dropout=0.25)"
