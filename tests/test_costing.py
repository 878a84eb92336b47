"""The cost of an adapter is that of the operations it really runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from zoo.every_method import METHODS, spec_of

import lrcompile
from lrcompile.costing import cost
from lrcompile.recipes import recipe
from lrcompile.sites.site import Site

T, IN, OUT, R = 100, 64, 48, 3
PAIR = 2 * T * R


def site(**fields: Any) -> Site:
    whole = {"name": "a.up", "kind": "linear", "host": "a.up", "slot": "weight", "in_features": IN, "out_features": OUT}
    return Site(**{**whole, **fields})


@pytest.mark.parametrize(
    ("method", "flops", "saved"),
    [
        ("lora", 3 * PAIR * (IN + OUT), IN + R),
        ("lora-fa", PAIR * (2 * IN + 3 * OUT), R),
        ("pissa", 6 * PAIR * (IN + OUT), None),
        ("galore", PAIR * (IN + OUT), IN),
        ("ia3", 0, None),
    ],
)
def test_products_and_bytes_are_those_of_the_method(method, flops, saved):
    found = cost(spec_of(method), site(), T, torch.float32)
    assert found.flops == flops
    assert saved is None or found.saved_bytes == 4 * T * saved


def test_a_projection_on_the_right_saves_its_code_only():
    found = cost(spec_of("galore"), site(in_features=OUT, out_features=IN), T, torch.float32)
    assert found.saved_bytes == 4 * T * R


def test_a_lookup_reads_rows_and_multiplies_by_B_alone():
    found = cost(lrcompile.spec("lora", rank=R), site(form="lookup", kind="embedding"), T, torch.float32)
    assert found.flops == 3 * PAIR * OUT


def test_dropout_replayed_from_a_seed_saves_the_code_only():
    found = cost(spec_of("lora-fa", dropout=0.1), site(), T, torch.float32)
    assert found.saved_bytes == 4 * T * R


@pytest.mark.parametrize("method", [name for name in METHODS if recipe(name).form is not None])
def test_every_form_can_be_counted_and_no_random_number_is_drawn(method):
    state = torch.get_rng_state()
    assert cost(spec_of(method), site(copies=5), T, torch.bfloat16).flops >= 0
    assert torch.equal(state, torch.get_rng_state())
