"""One schedule for all maps of an input: values and every gradient are those of the dialect's plain definitions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from zoo.training import flops

from lrcompile.dialect import galore as galore  # registers the ops
from lrcompile.dialect import nf4 as nf4
from lrcompile.kernels.dropout import mask
from lrcompile.kernels.nf4_dequant import quantize_nf4
from lrcompile.lowered.bases import Dense, Quantized
from lrcompile.lowered.contractions import ORDERS, Order
from lrcompile.lowered.group import AdaptedGroup
from lrcompile.lowered.members import Group, Member
from lrcompile.lowered.operands import Operands

INSIDE = 32  # a whole block of NF4
KINDS = ("lora", "conv1d", "nf4", "codes", "dropout", "shared", "right", "left")


@dataclass
class Map:
    """One member with its tensors, and what the dialect says it is."""

    kind: str
    base: Any
    held: list[Any]
    bias: Tensor | None
    A: Tensor
    B: Tensor
    scale: Tensor | None
    p: float = 0.0
    seed: Tensor | None = None
    diagonals: tuple[Tensor | None, ...] = (None,) * 4
    """Rows and columns that A is between, and those of B."""

    @property
    def factors(self) -> list[Tensor]:
        """A and B as they act."""
        pairs = zip((self.A, self.B), (self.diagonals[:2], self.diagonals[2:]), strict=True)
        return [
            (1 if rows is None else rows[:, None]) * factor * (1 if columns is None else columns)
            for factor, (rows, columns) in pairs
        ]

    @property
    def role(self) -> Any:
        return self.kind if self.kind in ("right", "left") else "pair"

    def plain(self, x: Tensor) -> Tensor:
        if isinstance(self.base, Quantized):
            y = torch.ops.lrcompile.nf4_linear(
                x, *self.held, self.bias, self.base.out_features, self.base.in_features, 64, False,
                self.base.compute_dtype,
            )  # fmt: skip
        else:
            y = F.linear(x, self.held[0].t() if self.base.transposed else self.held[0], self.bias)
        if self.role == "right":
            return torch.ops.lrcompile.project_gradient(y, x, self.B, self.A, True)
        if self.role == "left":
            return torch.ops.lrcompile.project_gradient(y, x, self.A, self.B, False)
        if self.seed is None:
            return torch.ops.lrcompile.lora(y, x, *self.factors, self.scale)
        assert self.scale is not None
        drawn = mask(x.reshape(-1, x.shape[-1]), self.p, int(self.seed)).view_as(x)
        A, B = self.factors
        return y + F.linear(F.linear(x * drawn, A), B) * self.scale


def build(kind: str, out: int, rank: int, trains: tuple[bool, bool, bool], dtype: torch.dtype = torch.float64) -> Map:
    def draw(*shape: int, grad: bool = False) -> Tensor:
        return torch.randn(*shape, dtype=dtype).requires_grad_(grad)

    trains_A, trains_B, bias = trains
    if kind in ("right", "left"):
        trains_A, trains_B = kind == "left", kind == "right"
    base: Any = Dense()
    if kind in ("nf4", "codes"):
        base = Quantized(out, INSIDE, 64, False, dtype, by_codes=kind == "codes")
        held: list[Any] = list(quantize_nf4(torch.randn(out, INSIDE)))
    elif kind == "conv1d":
        base, held = Dense(transposed=True), [draw(INSIDE, out)]
    else:
        held = [draw(out, INSIDE)]
    projects = kind in ("right", "left")
    dropped = kind == "dropout"
    return Map(
        kind, base, held, draw(out, grad=trains[2]) if bias else None, draw(rank, INSIDE, grad=trains_A),
        draw(out, rank, grad=trains_B), None if projects else torch.tensor(0.7), 0.3 if dropped else 0.0,
        torch.randint(2**62, ()) if dropped else None,
    )  # fmt: skip


def lower(maps: list[Map], orders: list[Order] | None = None) -> tuple[AdaptedGroup, list[Any]]:
    """A group in which maps of the kind "shared" read one A."""
    codes: list[Map] = []
    members = []
    for index, one in enumerate(maps):
        shared = [code for code, other in enumerate(codes) if other.kind == one.kind == "shared"]
        code = shared[0] if shared else len(codes)
        if not shared:
            codes.append(one)
        members.append(Member(one.base, code, one.role, orders[index] if orders else Order()))
    operands = Operands(
        [one.held for one in maps], [one.bias for one in maps], [one.B for one in maps], [one.scale for one in maps],
        [one.A for one in codes], [one.seed for one in codes],
        [*(one.diagonals[0] for one in codes), *(one.diagonals[2] for one in maps)],
        [*(one.diagonals[1] for one in codes), *(one.diagonals[3] for one in maps)],
    )  # fmt: skip
    return AdaptedGroup(tuple(members), tuple(one.p for one in codes)), operands.flat()


def share(maps: list[Map]) -> list[Map]:
    """Maps of the kind "shared" get the first one's A."""
    first = next((one.A for one in maps if one.kind == "shared"), None)
    for one in maps:
        if one.kind == "shared":
            assert first is not None
            one.A = first
            one.B = torch.randn(one.B.shape[0], first.shape[0], dtype=first.dtype).requires_grad_(one.B.requires_grad)
    return maps


def leaves(maps: list[Map], x: Tensor) -> list[Tensor]:
    found = [x, *(t for one in maps for t in (one.bias, one.A, one.B, *one.diagonals) if t is not None)]
    return [t for t in dict.fromkeys(found) if t.requires_grad]


def differentiated(ys: tuple[Tensor, ...], dys: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    used = [(y, dy) for y, dy in zip(ys, dys, strict=True) if y.requires_grad]
    if not used:
        return []
    return list(torch.autograd.grad([y for y, _ in used], inputs, [dy for _, dy in used], materialize_grads=True))


def compare(maps: list[Map], x: Tensor, orders: list[Order] | None = None) -> None:
    """float64 products of these sizes agree to 1e-12 in any order."""
    group, operands = lower(maps, orders)
    found, expected = group(x, *operands), tuple(one.plain(x) for one in maps)
    for y, true in zip(found, expected, strict=True):
        torch.testing.assert_close(y, true, rtol=1e-12, atol=1e-11)
    assert any(y.requires_grad for y in found) == any(true.requires_grad for true in expected)
    dys = [torch.randn_like(y) for y in expected]
    inputs = leaves(maps, x)
    pairs = zip(differentiated(found, dys, inputs), differentiated(expected, dys, inputs), strict=True)
    for gradient, true in pairs:
        assert gradient.dtype == true.dtype
        torch.testing.assert_close(gradient, true, rtol=1e-12, atol=1e-11)


MAPS = st.lists(
    st.tuples(
        st.sampled_from(KINDS),
        st.integers(1, 9),
        st.integers(1, 5),
        st.tuples(st.booleans(), st.booleans(), st.booleans()),
    ),
    min_size=1,
    max_size=4,
)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(maps=MAPS, lead=st.sampled_from([(), (1,), (0,), (7,), (2, 3), (2, 0)]), x_trains=st.booleans())
def test_values_and_all_gradients_are_those_of_the_plain_definitions(maps, lead, x_trains):
    x = torch.randn(*lead, INSIDE, dtype=torch.float64, requires_grad=x_trains)
    compare(share([build(*one) for one in maps]), x)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(
    maps=st.lists(
        st.tuples(
            st.sampled_from(["lora", "nf4", "dropout", "conv1d"]),
            st.integers(1, 9),
            st.integers(1, 5),
            st.tuples(st.booleans(), st.booleans(), st.booleans()),
            st.lists(st.sampled_from([None, True, False]), min_size=4, max_size=4),
            st.sampled_from(ORDERS),
        ),
        min_size=1,
        max_size=3,
    ),
    lead=st.sampled_from([(0,), (7,), (2, 3)]),
    x_trains=st.booleans(),
)
def test_factors_between_diagonals_that_train_or_not_give_the_same_function_and_gradients(maps, lead, x_trains):
    x = torch.randn(*lead, INSIDE, dtype=torch.float64, requires_grad=x_trains)
    built = [build(*each[:4]) for each in maps]
    for one, (*_, given_, _) in zip(built, maps, strict=True):
        sizes = (one.A.shape[0], INSIDE, one.B.shape[0], one.A.shape[0])
        one.diagonals = tuple(
            None if trains is None else torch.randn(size, dtype=torch.float64).requires_grad_(trains)
            for size, trains in zip(sizes, given_, strict=True)
        )
    orders = [each[5] if each[0] in ("lora", "conv1d") else Order() for each in maps]
    compare(built, x, orders)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(
    maps=st.lists(
        st.tuples(
            st.sampled_from(["lora", "conv1d"]),
            st.integers(1, 9),
            st.integers(1, 5),
            st.tuples(st.booleans(), st.booleans(), st.booleans()),
            st.sampled_from(ORDERS),
        ),
        min_size=1,
        max_size=3,
    ),
    neighbour=st.sampled_from([None, *KINDS]),
    lead=st.sampled_from([(), (0,), (7,), (2, 3)]),
    x_trains=st.booleans(),
)
def test_every_order_of_contraction_gives_the_same_function_and_gradients(maps, neighbour, lead, x_trains):
    x = torch.randn(*lead, INSIDE, dtype=torch.float64, requires_grad=x_trains)
    built, orders = [build(*one[:4]) for one in maps], [one[4] for one in maps]
    if neighbour is not None:
        built, orders = [*built, build(neighbour, 6, 2, (True, True, False))], [*orders, Order()]
    compare(share(built), x, orders)


def test_gradients_are_the_derivatives():
    maps = share(
        [build(kind, 5, 2, (True, True, True)) for kind in ("lora", "conv1d", "nf4", "codes", "shared", "shared")]
    )
    group, operands = lower(maps)
    x = torch.randn(3, INSIDE, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *given: group(x, *given), (x, *operands))


def test_there_is_no_gradient_of_the_gradient():
    group, operands = lower([build("lora", 5, 2, (True, True, False))])
    x = torch.randn(3, INSIDE, dtype=torch.float64, requires_grad=True)
    (y,) = group(x, *operands)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


# What a step multiplies, in FLOPs: T rows, i inside, o out, r rank.
T, OUT, RANK = 11, 9, 3
BASE, DOWN, UP = 4 * T * INSIDE * OUT, 2 * T * INSIDE * RANK, 2 * T * OUT * RANK
STEPS = {
    "both factors": (("lora", (True, True)), True, BASE + 3 * DOWN + 3 * UP),
    "both, x without a gradient": (("lora", (True, True)), False, BASE // 2 + 2 * DOWN + 3 * UP),
    "A frozen": (("lora", (False, True)), True, BASE + 2 * DOWN + 3 * UP),
    "A frozen, x without a gradient": (("lora", (False, True)), False, BASE // 2 + DOWN + 2 * UP),
    "B frozen": (("lora", (True, False)), True, BASE + 3 * DOWN + 2 * UP),
    "both frozen": (("lora", (False, False)), True, BASE + 2 * DOWN + 2 * UP),
    "projected on the right": (("right", (False, True)), True, BASE + DOWN + UP),
    "projected on the left": (("left", (True, False)), True, BASE + DOWN + UP),
    "dropout": (("dropout", (True, True)), True, BASE + 3 * DOWN + 3 * UP),
    "NF4": (("nf4", (True, True)), True, BASE + 3 * DOWN + 3 * UP),
    "NF4 by its codes": (("codes", (True, True)), True, BASE + 3 * DOWN + 3 * UP),
    "transposed": (("conv1d", (True, True)), True, BASE + 3 * DOWN + 3 * UP),
}


def stepped(maps: list[Map], x: Tensor, orders: list[Order] | None = None) -> int:
    group, operands = lower(maps, orders)

    def run() -> None:
        ys = group(x, *operands)
        torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])

    return flops(run)


@pytest.mark.parametrize("name", STEPS)
def test_a_step_costs_exactly_the_products_its_gradients_need(name):
    (kind, (trains_A, trains_B)), x_trains, expected = STEPS[name]
    x = torch.randn(T, INSIDE, dtype=torch.float64, requires_grad=x_trains)
    assert stepped([build(kind, OUT, RANK, (trains_A, trains_B, False))], x) == expected


def test_a_group_costs_the_sum_of_its_maps_and_a_shared_code_is_formed_once():
    x = torch.randn(T, INSIDE, dtype=torch.float64, requires_grad=True)
    three = [build("lora", OUT + i, RANK, (True, True, False)) for i in range(3)]
    assert stepped(three, x) == sum(6 * T * RANK * (INSIDE + OUT + i) + 4 * T * INSIDE * (OUT + i) for i in range(3))
    vera = share([build("shared", OUT + i, RANK, (False, True, False)) for i in range(3)])
    assert stepped(vera, x) == 2 * DOWN + sum(6 * T * RANK * (OUT + i) + 4 * T * INSIDE * (OUT + i) for i in range(3))


def kept(maps: list[Map], x: Tensor) -> list[tuple[int, ...]]:
    """Shapes of what autograd holds between the passes, given tensors aside."""
    group, operands = lower(maps)
    given = {t.untyped_storage().data_ptr() for t in operands if t is not None}
    shapes = []

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in given:
            shapes.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        group(x, *operands)
    return sorted(shapes)


KEPT = {
    "both factors": ("lora", (True, True), [(T, RANK), (T, INSIDE)]),
    "A frozen": ("lora", (False, True), [(T, RANK)]),
    "B frozen": ("lora", (True, False), [(T, INSIDE)]),
    "both frozen": ("lora", (False, False), []),
    "projected on the right": ("right", (False, True), [(T, RANK)]),
    "projected on the left": ("left", (True, False), [(T, INSIDE)]),
    "NF4": ("nf4", (True, True), [(T, RANK), (T, INSIDE)]),
    "NF4 by its codes": ("codes", (True, True), [(T, RANK), (T, INSIDE)]),
    "NF4, A frozen": ("nf4", (False, True), [(T, RANK)]),
    "dropout": ("dropout", (True, True), [(T, RANK), (T, INSIDE)]),
    "dropout, A frozen": ("dropout", (False, True), [(T, RANK)]),
}


@pytest.mark.parametrize("name", KEPT)
def test_only_what_a_gradient_reads_is_kept(name):
    kind, trains, expected = KEPT[name]
    x = torch.randn(T, INSIDE, dtype=torch.float64, requires_grad=True)
    assert kept([build(kind, OUT, RANK, (*trains, False))], x) == expected


def test_x_is_kept_once_for_the_whole_group():
    x = torch.randn(T, INSIDE, dtype=torch.float64, requires_grad=True)
    maps = [build("lora", OUT + i, RANK + i, (True, True, False)) for i in range(3)]
    assert kept(maps, x) == [(T, RANK), (T, RANK + 1), (T, RANK + 2), (T, INSIDE)]


def bound(maps: list[Map], x: Tensor, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs in float64, and how far `dtype` may round them: each product and each sum once, and once B·s."""
    values, sizes = [], []
    for one in maps:
        W = one.held[0].double()
        A, B = one.A.double(), one.B.double() * 0.7
        values.append(x.double() @ W.t() + x.double() @ A.t() @ B.t())
        size = x.double().abs() @ W.abs().t() + x.double().abs() @ A.abs().t() @ B.abs().t()
        sizes.append(8 * torch.finfo(dtype).eps * size)
    return values, sizes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_dtypes_round_as_often_as_the_products_do(dtype):
    maps = [build("lora", OUT + i, RANK, (True, True, False), dtype) for i in range(2)]
    x = torch.randn(T, INSIDE).to(dtype)
    group, operands = lower(maps)
    for y, true, size in zip(group(x, *operands), *bound(maps, x, dtype), strict=True):
        assert y.dtype == dtype
        assert bool(((y.double() - true).abs() <= size).all())


def test_float32_factors_beside_a_bfloat16_base_get_float32_gradients():
    (one,) = maps = [build("lora", OUT, RANK, (True, True, False), torch.bfloat16)]
    one.A, one.B = (t.detach().float().requires_grad_() for t in (one.A, one.B))
    x = torch.randn(T, INSIDE, dtype=torch.bfloat16, requires_grad=True)
    group, operands = lower(maps)
    (y,) = group(x, *operands)
    dx, dA, dB = torch.autograd.grad(y, (x, one.A, one.B), torch.ones_like(y))
    assert (y.dtype, dx.dtype, dA.dtype, dB.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32)


@pytest.mark.parametrize("by_codes", [False, True])
@pytest.mark.parametrize("computes", [torch.float32, torch.bfloat16])
def test_an_nf4_base_computes_in_its_own_dtype(computes, by_codes):
    one = build("nf4", OUT, RANK, (True, True, True), torch.float32)
    one.base = Quantized(OUT, INSIDE, 64, False, computes, by_codes)
    x = torch.randn(T, INSIDE, requires_grad=True)
    group, operands = lower([one])
    (y,), true = group(x, *operands), one.plain(x)
    eps = torch.finfo(computes).eps
    torch.testing.assert_close(y, true, rtol=8 * eps, atol=8 * eps * INSIDE)
    dy = torch.randn_like(y)
    for found, expected in zip(
        differentiated((y,), [dy], leaves([one], x)), differentiated((true,), [dy], leaves([one], x)), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=8 * eps, atol=8 * eps * INSIDE)


def test_under_autocast_it_computes_and_answers_as_the_map_it_replaces():
    maps = [build("lora", OUT, RANK, (True, True, True), torch.float32)]
    x = torch.randn(T, INSIDE, requires_grad=True)
    group, operands = lower(maps)
    with torch.autocast("cpu", torch.bfloat16):
        (y,), true = group(x, *operands), maps[0].plain(x)
    assert y.dtype == true.dtype == torch.bfloat16
    eps = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(y, true, rtol=4 * eps, atol=4 * eps * INSIDE)
    dy = torch.randn_like(y)
    inputs = leaves(maps, x)
    for found, expected in zip(differentiated((y,), [dy], inputs), differentiated((true,), [dy], inputs), strict=True):
        assert found.dtype == expected.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=8 * eps, atol=8 * eps * INSIDE)


WRONG: dict[str, Any] = {
    "a code nobody reads": lambda: Group((Member(Dense(), 0),), (0.0, 0.0)),
    "a code that is not there": lambda: Group((Member(Dense(), 1),), (0.0,)),
    "two roles of one code": lambda: Group((Member(Dense(), 0), Member(Dense(), 0, "right")), (0.0,)),
    "dropout of a projection": lambda: Group((Member(Dense(), 0, "right"),), (0.1,)),
    "an order under dropout": lambda: Group((Member(Dense(), 0, order=Order(merged=True)),), (0.1,)),
    "an order of a shared code": lambda: Group((Member(Dense(), 0, order=Order(True)), Member(Dense(), 0)), (0.0,)),
    "an order of a projection": lambda: Member(Dense(), 0, "left", Order(by_weight=True)),
    "an order of codes": lambda: Member(Quantized(8, 8, 64, False, torch.float32), 0, "pair", Order(merged=True)),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_computed_cannot_be_described(name):
    with pytest.raises(ValueError, match=r"code|order"):
        WRONG[name]()
