"""What each order of contraction costs, and that the least is chosen."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from zoo.training import flops as counted

from lrcompile.lowered.bases import Dense
from lrcompile.lowered.contractions import (
    MACHINES,
    MARGIN,
    ORDERS,
    Machine,
    Order,
    Product,
    Shapes,
    cheapest,
    flops,
    products,
    seconds,
)
from lrcompile.lowered.group import AdaptedGroup
from lrcompile.lowered.members import Member

SIZES = [(1, 5, 7, 2), (11, 6, 3, 4), (8, 9, 4, 13)]
WANTED = list(product((True, False), repeat=3))
T, IN, OUT, R = 2048, 512, 384, 16


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("wanted", WANTED, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_step_multiplies_exactly_what_the_model_says(size, wanted, order):
    rows, inside, out, rank = size
    wants_x, wants_A, wants_B = wanted
    draw = lambda *shape, grad=False: torch.randn(*shape, dtype=torch.float64).requires_grad_(grad)  # noqa: E731
    group = AdaptedGroup((Member(Dense(), 0, order=order),), (0.0,))
    x = draw(rows, inside, grad=wants_x)
    operands = (draw(out, inside), None, draw(out, rank, grad=wants_B), torch.tensor(0.7),
                draw(rank, inside, grad=wants_A), None)  # fmt: skip

    def run() -> None:
        (y,) = group(x, *operands)
        if any(wanted):
            y.sum().backward()

    if any(wanted):
        assert counted(run) == flops(Shapes(*size, *wanted), order)


def test_the_default_is_the_least_for_products_through_the_factors():
    assert flops(Shapes(T, IN, OUT, R), Order()) == 4 * T * IN * OUT + 6 * T * R * (IN + OUT)


def test_merged_and_through_the_weight_cost_what_theory_says():
    base = 4 * T * IN * OUT
    assert flops(Shapes(T, IN, OUT, R), Order(merged=True)) == base + 4 * T * R * (IN + OUT) + 2 * IN * OUT * R
    assert flops(Shapes(T, IN, OUT, R), Order(True, True)) == base + 2 * T * IN * OUT + 6 * IN * OUT * R
    split = flops(Shapes(T, IN, OUT, R), Order(by_weight=True))
    assert split == base + 4 * T * R * (IN + OUT) + 2 * T * IN * OUT + 4 * IN * OUT * R


@pytest.mark.parametrize("machine", [*MACHINES.values(), Machine(1.0, 1e30), Machine(1e30, 1.0)], ids=str)
def test_the_chosen_order_takes_the_least_time_or_the_default_is_within_the_margin(machine):
    for rows, inside, out, rank in product((1, 64, 4096), (64, 4096), (64, 1024), (4, 256, 2048)):
        shapes = Shapes(rows, inside, out, rank)
        times = {order: seconds(shapes, order, machine, torch.float32) for order in ORDERS}
        chosen = cheapest(shapes, machine, torch.float32)
        assert times[chosen] == min(times.values()) or (
            chosen == Order() and min(times.values()) >= (1 - MARGIN) * times[chosen]
        )


def test_every_order_is_chosen_somewhere_but_the_default_for_small_ranks():
    machine = MACHINES["cpu", torch.float32]
    assert cheapest(Shapes(512, 1024, 1024, 16), machine, torch.float32) == Order()
    assert cheapest(Shapes(8192, 1024, 1024, 256), machine, torch.float32) == Order(merged=True)
    assert cheapest(Shapes(8192, 1024, 1024, 1024), machine, torch.float32) == Order(merged=True, by_weight=True)


def test_where_memory_is_infinitely_fast_arithmetic_alone_decides():
    """Merged is less arithmetic exactly where rows > io/(i + o)."""
    even = IN * OUT // (IN + OUT)
    split, merged = (
        lambda rows, order=order: flops(Shapes(rows, IN, OUT, R), order) for order in (Order(), Order(True))
    )
    assert merged(even) > split(even)
    assert merged(even + 1) < split(even + 1)
    machine, many = Machine(1.0, 1e30), 64 * even
    assert cheapest(Shapes(even, IN, OUT, 4 * R), machine, torch.float32) == Order()
    assert cheapest(Shapes(many, IN, OUT, 4 * R), machine, torch.float32) == Order(merged=True)


def test_a_product_takes_its_arithmetic_or_its_traffic():
    one = Product(10, 20, 30, accumulates=True)
    assert one.flops == 2 * 10 * 20 * 30
    assert one.elements == 10 * 20 + 20 * 30 + 2 * 10 * 30
    assert Machine(1.0, 1e30).seconds(one, torch.float32) == one.flops
    assert Machine(1e30, 1.0).seconds(one, torch.float32) == 4 * one.elements


def test_every_product_of_a_list_is_one_of_the_step():
    assert len(list(products(Shapes(T, IN, OUT, R), Order()))) == 2 + 6
    assert len(list(products(Shapes(T, IN, OUT, R), Order(merged=True)))) == 2 + 1 + 4
