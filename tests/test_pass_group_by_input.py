"""Linear maps of one input become one node, adapters and all; what cannot is left as it is, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D
from zoo.training import captured, rewriting, step, targets

from lrcompile.dialect import galore as galore  # registers the ops
from lrcompile.kernels.nf4_dequant import quantize_nf4
from lrcompile.lowered.bases import Dense, Quantized
from lrcompile.lowered.group import AdaptedGroup
from lrcompile.passes.group_by_input import GroupByInput
from lrcompile.passes.nodes import LORA, PROJECT
from lrcompile.passes.pipeline import Pipeline

lora, project = torch.ops.lrcompile.lora, torch.ops.lrcompile.project_gradient
IN, T = 32, 6
PIPELINE = Pipeline((GroupByInput(),))


class Map(nn.Module):
    """A frozen linear map and a pair of factors."""

    def __init__(self, out: int, rank: int = 3, bias: bool = False, trains: bool = False):
        super().__init__()
        self.W = nn.Parameter(torch.randn(out, IN, dtype=torch.float64), requires_grad=trains)
        self.b = nn.Parameter(torch.randn(out, dtype=torch.float64)) if bias else None
        self.A = nn.Parameter(torch.randn(rank, IN, dtype=torch.float64))
        self.B = nn.Parameter(torch.randn(out, rank, dtype=torch.float64))
        self.register_buffer("scale", torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return lora(F.linear(x, self.W, self.b), x, self.A, self.B, self.scale)


class Projected(Map):
    """Its factor that trains is Z; the other one projects."""

    def __init__(self, out: int, rank: int = 3, right: bool = True):
        super().__init__(out, rank)
        self.right = right
        (self.A if right else self.B).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        Z, P = (self.B, self.A) if self.right else (self.A, self.B)
        return project(F.linear(x, self.W, self.b), x, Z, P, self.right)


def frozen(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, dtype=torch.float64), requires_grad=False)


class Vera(Map):
    """Two vectors train between frozen projections; A is one tensor for all that are given it."""

    def __init__(self, out: int, A: nn.Parameter):
        super().__init__(out, A.shape[0])
        self.A = A
        self.B.requires_grad_(False)
        self.d = nn.Parameter(torch.rand(A.shape[0], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return lora(F.linear(x, self.W, self.b), x, self.A[:, :IN], self.B * self.d, self.scale)


class Nf4(Map):
    def __init__(self, out: int, rank: int = 3):
        super().__init__(out, rank)
        held = quantize_nf4(self.W.detach())
        for name, tensor in zip(("codes", "absmax", "absmax_scale", "absmax_offset"), held, strict=True):
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        held = (self.codes, self.absmax, self.absmax_scale, self.absmax_offset)
        y = torch.ops.lrcompile.nf4_linear(x, *held, self.b, len(self.W), IN, 64, False, x.dtype)
        return lora(y, x, self.A, self.B, self.scale)


class Gpt2(Map):
    """transformers' Conv1D, whose weight is [in, out] and always has a bias."""

    def __init__(self, out: int, rank: int = 3):
        super().__init__(out, rank)
        self.conv = Conv1D(out, IN).double()
        self.conv.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return lora(self.conv(x), x, self.A, self.B, self.scale)


class Net(nn.Module):
    def __init__(self, body: Callable[..., Any], *maps: nn.Module):
        super().__init__()
        self.body, self.maps = body, nn.ModuleList(maps)

    def forward(self, x: Tensor) -> Any:
        return self.body(x, *self.maps)


def every(x: Tensor, *maps: nn.Module) -> tuple[Tensor, ...]:
    return tuple(each(x) for each in maps)


def lead(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, IN, dtype=dtype, requires_grad=True)


def grouped(graph: fx.GraphModule) -> list[AdaptedGroup]:
    return [target for target in targets(graph) if isinstance(target, AdaptedGroup)]


def rewritten(net: nn.Module, x: Tensor) -> tuple[list[fx.GraphModule], list[str]]:
    """What the pass makes of every graph and body, and why it refused; twice is once."""
    graphs = captured(net, x)
    reasons = [refusal.reason for graph in graphs for refusal in GroupByInput().apply(graph).refusals]
    for graph in graphs:
        before = graph.code
        again = GroupByInput().apply(graph)
        assert not again.modified
        assert graph.code == before
    return graphs, reasons


def same_function(net: nn.Module, x: Tensor, rtol: float = 1e-12) -> None:
    """The rewritten graph run as it is: values, and the gradients of x and of every parameter."""
    torch._dynamo.reset()
    outcomes = []
    for run in (net, torch.compile(net, backend=rewriting(PIPELINE), dynamic=False)):
        net.zero_grad()
        x.grad = None
        ys = run(x)
        ys = ys if isinstance(ys, tuple) else (ys,)
        dys = [torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y) for y in ys]
        torch.autograd.backward(ys, dys)
        gradients = {name: each.grad for name, each in net.named_parameters() if each.grad is not None}
        outcomes.append((ys, x.grad, gradients))
    (ys, dx, gradients), (new_ys, new_dx, new_gradients) = outcomes
    torch.testing.assert_close(new_ys, ys, rtol=rtol, atol=100 * rtol)
    torch.testing.assert_close(new_dx, dx, rtol=rtol, atol=100 * rtol)
    torch.testing.assert_close(new_gradients, gradients, rtol=rtol, atol=100 * rtol)


def mixed() -> tuple[nn.Module, ...]:
    shared = frozen(4, IN + 2)
    return Map(8), Projected(9), Projected(5, right=False), Vera(6, shared), Vera(7, shared), Nf4(4), Gpt2(3)


# name: maps, of which each group's (members, codes, rows of all A together)
GROUPS: dict[str, tuple[Callable[[], tuple[nn.Module, ...]], list[tuple[int, int]]]] = {
    "one map": (lambda: (Map(8),), [(1, 1)]),
    "q, k, v with ragged ranks and a bias": (lambda: (Map(8, 3), Map(4, 2, bias=True), Map(5, 7)), [(3, 3)]),
    "gate and up": (lambda: (Map(12), Map(12)), [(2, 2)]),
    "GPT-2's one map for q, k and v": (lambda: (Gpt2(24),), [(1, 1)]),
    "NF4 bases": (lambda: (Nf4(8), Nf4(4)), [(2, 2)]),
    "an NF4 base beside a dense one": (lambda: (Nf4(8), Map(4)), [(2, 2)]),
    "lora, galore on either side, vera, NF4 and Conv1D": (mixed, [(7, 6)]),
}


@pytest.mark.parametrize("name", GROUPS)
def test_maps_of_one_input_become_one_node(name):
    maps, expected = GROUPS[name]
    torch.manual_seed(0)
    net, x = Net(every, *maps()), lead(2, 3)
    ((graph,), reasons) = rewritten(net, x)
    assert reasons == []
    assert [(len(each.members), each.codes) for each in grouped(graph)] == expected
    left = {target for target in targets(graph) if not isinstance(target, AdaptedGroup)}
    assert left.isdisjoint({F.linear, torch._C._nn.linear, torch.addmm, LORA, PROJECT, lora, project})
    same_function(net, x)


def test_each_node_of_q_k_v_is_there_once():
    ((graph,), _) = rewritten(Net(every, Map(8), Map(4), Map(5)), lead(T))
    assert len(targets(graph)) == 1 + 3  # the group and its outputs


def test_A_that_several_maps_share_is_read_once():
    shared = frozen(4, IN)
    ((graph,), _) = rewritten(Net(every, *(Vera(5 + i, shared) for i in range(3))), lead(T))
    (group,) = grouped(graph)
    assert [each.code for each in group.members] == [0, 0, 0]


def test_equal_slices_of_a_shared_A_are_one():
    shared = frozen(4, IN + 5)
    ((graph,), _) = rewritten(Net(every, *(Vera(5 + i, shared) for i in range(3))), lead(T))
    (group,) = grouped(graph)
    assert group.codes == 1


def test_what_holds_a_weight_is_known_to_the_schedule():
    ((graph,), _) = rewritten(Net(every, Map(8), Nf4(4), Gpt2(3)), lead(T))
    (group,) = grouped(graph)
    assert [each.base for each in group.members] == [
        Dense(), Quantized(4, IN, 64, False, torch.float64), Dense(transposed=True)
    ]  # fmt: skip


def test_cross_attention_groups_k_and_v_of_the_memory_and_leaves_q_alone():
    def attend(x: Tensor, q: Map, k: Map, v: Map) -> Tensor:
        memory = x.sin()
        return F.scaled_dot_product_attention(q(x), k(memory), v(memory))

    net, x = Net(attend, Map(8), Map(8), Map(8)), lead(2, 3)
    ((graph,), _) = rewritten(net, x)
    assert sorted(len(each.members) for each in grouped(graph)) == [1, 2]
    same_function(net, x)


def test_maps_far_apart_are_grouped_where_the_first_is():
    def apart(x: Tensor, one: Map, other: Map) -> Tensor:
        return one(x).sin().sum() + other(x).cos().sum()

    net, x = Net(apart, Map(8), Map(4)), lead(T)
    ((graph,), _) = rewritten(net, x)
    assert [len(each.members) for each in grouped(graph)] == [2]
    same_function(net, x)


def test_factors_computed_behind_the_first_map_are_moved_before_it():
    def late(x: Tensor, one: Map, other: Map) -> Tensor:
        y = one(x)
        A, B = other.A.tanh() * 2, other.B.sin() + 1
        return y.sum() + lora(F.linear(x, other.W), x, A, B, other.scale).sum()

    net, x = Net(late, Map(8), Map(4)), lead(T)
    ((graph,), _) = rewritten(net, x)
    assert [len(each.members) for each in grouped(graph)] == [2]
    same_function(net, x)


def test_a_map_that_needs_another_one_of_its_input_is_no_member_of_its_group():
    def chained(x: Tensor, one: Map, other: Map) -> Tensor:
        y = one(x)
        return lora(F.linear(x, other.W), x, other.A * y.mean(), other.B, other.scale)

    net, x = Net(chained, Map(8), Map(4)), lead(T)
    ((graph,), _) = rewritten(net, x)
    assert [len(each.members) for each in grouped(graph)] == [1, 1]
    same_function(net, x)


def test_what_two_groups_need_early_is_moved_before_the_first():
    def crossed(x: Tensor, one: Map, other: Map, third: Map, fourth: Map) -> Tensor:
        z = x.sin()
        first, second = one(x), third(z)
        B = other.B.sin()
        return first.sum() + second.sum() + (
            lora(F.linear(x, other.W), x, other.A, B, other.scale).sum()
            + lora(F.linear(z, fourth.W), z, fourth.A, B, fourth.scale).sum()
        )  # fmt: skip

    net, x = Net(crossed, Map(8), Map(4), Map(7), Map(4)), lead(T)
    ((graph,), _) = rewritten(net, x)
    assert [len(each.members) for each in grouped(graph)] == [2, 2]
    same_function(net, x)


def test_draws_of_random_numbers_are_not_equal():
    def noisy(x: Tensor, one: Map, other: Map) -> tuple[Tensor, Tensor]:
        factors = [torch.randn(3, IN, dtype=x.dtype) for _ in range(2)]
        return tuple(
            lora(F.linear(x, each.W), x, A, each.B, each.scale) for each, A in zip((one, other), factors, strict=True)
        )

    ((graph,), _) = rewritten(Net(noisy, Map(8), Map(4)), lead(T))
    (group,) = grouped(graph)
    assert group.codes == 2


# --- what it leaves as it is


def seen(x: Tensor, one: Map) -> tuple[Tensor, Tensor]:
    y = F.linear(x, one.W)
    return lora(y, x, one.A, one.B, one.scale), y.sin()


def computed_weight(x: Tensor, one: Map) -> Tensor:
    return lora(F.linear(x, one.W * 2), x, one.A, one.B, one.scale)


def other_input(x: Tensor, one: Map) -> Tensor:
    return lora(F.linear(x, one.W), x.sin(), one.A, one.B, one.scale)


def no_map(x: Tensor, one: Map) -> Tensor:
    return lora(x.sin() @ one.W.t(), x, one.A, one.B, one.scale)


def dropped(x: Tensor, one: Map) -> Tensor:
    return lora(F.linear(x, one.W), x, one.A, one.B, one.scale, 0.1)


def written_between(x: Tensor, one: Map) -> Tensor:
    z = x * 1
    y = F.linear(z, one.W)
    z.add_(1)
    return lora(y, z, one.A, one.B, one.scale)


def autocast_between(x: Tensor, one: Map) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = F.linear(x, one.W)
    return lora(y, x, one.A, one.B, one.scale)


def stacked(x: Tensor, one: Map) -> Tensor:
    z = x[None]
    return lora(F.linear(z, one.W), z, one.A[None], one.B[None], one.scale)


def scale_trains(x: Tensor, one: Map) -> Tensor:
    return lora(F.linear(x, one.W), x, one.A, one.B, one.A.mean())


REFUSED: dict[str, tuple[Callable[..., Any], dict[str, Any], str]] = {
    "y is seen by another node": (seen, {}, "another node sees the base's output"),
    "the weight trains": (every, {"trains": True}, "its base is no linear map with a frozen weight"),
    "the weight is computed": (computed_weight, {}, "its base is no linear map with a frozen weight"),
    "no linear map below": (no_map, {}, "its base is no linear map with a frozen weight"),
    "another input": (other_input, {}, "the adapter and the base have different inputs"),
    "active dropout": (dropped, {}, "dropout 0.1 is active"),
    "a write between base and adapter": (
        written_between, {}, "tensors or modes may change between the base and the adapter"
    ),
    "autocast ends between base and adapter": (
        autocast_between, {}, "tensors or modes may change between the base and the adapter"
    ),
    "factors that are a stack": (stacked, {}, "its factors are a stack"),
    "a scale that trains": (scale_trains, {}, "its scale trains"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_change_the_function_is_left_with_a_reason(name):
    body, options, reason = REFUSED[name]
    net, x = Net(body, Map(8, **options)), lead(T)
    ((graph,), reasons) = rewritten(net, x)
    assert grouped(graph) == []
    assert reasons == [reason]
    if name != "active dropout":
        same_function(net, x)


def test_an_adapter_of_another_op_is_not_touched():
    def looked_up(x: Tensor, one: Map) -> Tensor:
        ids = torch.arange(3)
        y = F.embedding(ids, one.W.t())
        return torch.ops.lrcompile.lora_embedding(y, ids, one.A, one.B, one.scale) * x.sum()

    net, x = Net(looked_up, Map(8)), lead(T)
    before = captured(net, x)[0].code
    ((graph,), reasons) = rewritten(net, x)
    assert graph.code == before
    assert reasons == []


def test_a_write_between_two_maps_keeps_them_apart():
    def written(x: Tensor, one: Map, other: Map) -> tuple[Tensor, Tensor]:
        z = x * 1
        y = one(z)
        z.mul_(2)
        return y, other(z)

    net, x = Net(written, Map(8), Map(4)), lead(T)
    ((graph,), reasons) = rewritten(net, x)
    assert [len(each.members) for each in grouped(graph)] == [1, 1]
    assert reasons == []
    torch._dynamo.reset()  # autograd refuses the write in eager mode, which had x saved: values only
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(net, backend=rewriting(PIPELINE))(x), net(x), rtol=1e-12, atol=1e-10)


def test_an_autocast_region_that_begins_between_two_maps_keeps_them_apart():
    def half(x: Tensor, one: Map, other: Map) -> tuple[Tensor, Tensor]:
        y = one(x)
        with torch.autocast("cpu", torch.bfloat16):
            return y, other(x)

    net, x = Net(half, Map(8), Map(4)).float(), lead(T, dtype=torch.float32)
    ((graph,), _) = rewritten(net, x)
    assert [len(each.members) for each in grouped(graph)] == [1, 1]
    assert [y.dtype for y in torch.compile(net, backend=rewriting(PIPELINE))(x)] == [torch.float32, torch.bfloat16]


# --- where graphs lie within graphs


def test_a_checkpoint_s_body_is_rewritten():
    def inside(x: Tensor, *maps: Map) -> Any:
        return checkpoint(lambda z: every(z.sin(), *maps), x, use_reentrant=False)

    net, x = Net(inside, Map(8), Map(4, 2), Map(5)), lead(T)
    graphs, reasons = rewritten(net, x)
    assert reasons == []
    assert [[len(each.members) for each in grouped(graph)] for graph in graphs] == [[], [3]]
    same_function(net, x)


@pytest.mark.parametrize("outside", [True, False])
def test_under_autocast_values_and_dtypes_are_those_of_eager_mode(outside):
    def cast(x: Tensor, *maps: Map) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return every(x, *maps)

    body = every if outside else cast
    net, x = Net(body, Map(8, bias=True), Map(4, 2), Nf4(5)).float(), lead(T, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=outside):
        graphs, _ = rewritten(net, x)
        eager = net(x)
        found = torch.compile(net, backend=rewriting(PIPELINE))(x)
    assert [len(each.members) for graph in graphs for each in grouped(graph)] == [3]
    eps = torch.finfo(torch.bfloat16).eps
    for y, true in zip(found, eager, strict=True):
        assert y.dtype == true.dtype == torch.bfloat16
        torch.testing.assert_close(y, true, rtol=4 * eps, atol=4 * eps * IN)


# --- what AOTAutograd makes of it, partitioned as by Inductor


class Within(nn.Module):
    """Maps of an input that is computed in the graph, by a product nobody would recompute."""

    def __init__(self, *maps: Map):
        super().__init__()
        self.P, self.maps = frozen(IN, IN), nn.ModuleList(maps)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return every(x @ self.P.to(x.dtype), *self.maps)


def freeze(names: str, *maps: nn.Module) -> tuple[nn.Module, ...]:
    for each in maps:
        for name in names:
            getattr(each, name).requires_grad_(False)
    return maps


class Between(Map):
    """Its factors lie between diagonals, `of` saying which: "rB" for diag(r)·B, "Bc", "rA", "Ac"."""

    def __init__(self, out: int, rank: int, of: str, A: nn.Parameter | None = None):
        super().__init__(out, rank)
        self.of = of.split()
        self.A = self.A if A is None else A
        sizes = {"rB": (out, 1), "Bc": (rank,), "rA": (rank, 1), "Ac": (1, IN)}
        for name in self.of:
            self.register_parameter(name, nn.Parameter(torch.rand(*sizes[name], dtype=torch.float64) + 0.5))

    def factors(self) -> tuple[Tensor, Tensor]:
        A: Any = self.A
        B: Any = self.B
        if "rB" in self.of and "Bc" in self.of:
            B = (self.get_parameter("rB") * self.get_parameter("Bc")) * B  # as VeRA forms it
        elif set(self.of) & {"rB", "Bc"}:
            B = B * self.get_parameter(next(name for name in self.of if "B" in name))
        for name in self.of:
            A = self.get_parameter(name) * A if "A" in name else A
        return A, B

    def forward(self, x: Tensor) -> Tensor:
        return lora(F.linear(x, self.W, self.b), x, *self.factors(), self.scale)


@pytest.mark.parametrize("of", ["rB", "Bc", "rB Bc", "rA", "Ac", "rA Ac", "rB Bc rA"])
@pytest.mark.parametrize("frozen_factors", ["", "A", "B", "AB"])
def test_factors_between_diagonals_are_formed_within_the_node(of, frozen_factors):
    net, x = Net(every, *freeze(frozen_factors, Between(8, 3, of), Between(5, 3, of)), Map(4)), lead(2, 3)
    ((graph,), reasons) = rewritten(net, x)
    assert reasons == []
    assert len(targets(graph)) == 1 + 3  # the group and its outputs
    same_function(net, x)


@pytest.mark.parametrize("size", [(1, 3), (6, 1), (1, 1)])
def test_a_factor_of_one_row_or_column_is_between_its_diagonals_all_the_same(size):
    net, x = Net(every, Between(size[0], size[1], "rB Bc")), lead(2, 3)
    ((graph,), _) = rewritten(net, x)
    assert len(targets(graph)) == 2
    same_function(net, x)


def by_a_number(net: Map) -> Tensor:
    return net.B * 0.5


def by_two_vectors_of_one_kind(net: Map) -> Tensor:
    return net.B * net.B[:1] * net.B[1:2]


def by_a_full_matrix(net: Map) -> Tensor:
    return net.B * net.B.sin()


def by_a_number_that_is_a_tensor(net: Map) -> Tensor:
    return net.B * net.get_buffer("scale")


@pytest.mark.parametrize("B", [by_a_number, by_two_vectors_of_one_kind, by_a_full_matrix, by_a_number_that_is_a_tensor])
def test_other_products_stay_with_the_compiler(B):
    def scaled(x: Tensor, one: Map) -> Tensor:
        return lora(F.linear(x, one.W), x, one.A, B(one), one.scale)

    net, x = Net(scaled, Map(8)), lead(T)
    ((graph,), reasons) = rewritten(net, x)
    assert reasons == []
    assert len(grouped(graph)) == 1
    assert len(targets(graph)) > 2
    same_function(net, x)


def test_a_diagonal_that_is_written_after_its_product_is_not_read_later():
    def written(x: Tensor, one: Map) -> Tensor:
        d = one.B[:1].detach() * 1
        B = one.B * d
        d.zero_()
        return lora(F.linear(x, one.W), x, one.A, B, one.scale)

    net, x = Net(written, Map(8)).requires_grad_(False), lead(T)
    ((graph,), _) = rewritten(net, x)
    (node,) = [node for node in graph.graph.nodes if isinstance(node.target, AdaptedGroup)]
    assert isinstance(node.target, AdaptedGroup)
    operands = node.target.split(node.args[1:])
    assert operands.rows == operands.columns == [None, None]
    same_function(net, x)


# maps; shapes kept for the backward pass; calls that compute something large
TOGETHER = {"sum_of_products": 1, "group_products": 1, "stacked": 3}  # A in either pass, and dS
COMPILED: dict[str, tuple[Callable[[], Any], list[tuple[int, ...]], dict[str, int]]] = {
    "q, k, v": (
        lambda: (Map(8, 3), Map(4, 2), Map(5, 3)),
        [(T, 2), (T, 3), (T, 3), (T, IN)],
        {**TOGETHER, "group_gradients": 1, "mm": 2 + 2},
    ),
    "one map": (lambda: (Map(8, 3),), [(T, 3), (T, IN)], {"sum_of_products": 2, "factor_gradients": 1, "mm": 2 + 2}),
    "A frozen": (
        lambda: freeze("A", Map(8, 3), Map(4, 2)),
        [(T, 2), (T, 3)],
        {**TOGETHER, "group_gradients": 1, "mm": 1 + 2},
    ),
    "B frozen": (
        lambda: freeze("B", Map(8, 3), Map(4, 2)), [(T, IN)], {**TOGETHER, "sum_of_products": 3, "mm": 2 + 2},
    ),
    "both frozen": (
        lambda: freeze("AB", Map(8, 3), Map(4, 2)), [], {**TOGETHER, "sum_of_products": 3, "mm": 1 + 2},
    ),
    "NF4": (
        lambda: (Nf4(8, 3), Nf4(4, 2)),
        [(T, 2), (T, 3), (T, IN)],
        {"nf4_dequantize": 4, "sum_of_products": 3, "group_gradients": 1, "mm": 2 + 2, "stacked": 3},
    ),
    "NF4, A frozen": (
        lambda: freeze("A", Nf4(8, 3)),
        [(T, 3)],
        {"nf4_dequantize": 2, "sum_of_products": 2, "factor_gradients": 1, "mm": 1 + 2},
    ),
    "VeRA": (
        lambda: freeze("AB", *(Between(out, 3, "rB Bc", A) for A in [frozen(3, IN)] for out in (8, 5))),
        [(T, 3)],
        {
            "sum_of_products": 1, "group_products": 1, "group_gradients": 1, "added": 1, "scaled_factor": 4,
            "diagonal_gradients": 2, "mm": 1 + 2,
        },
    ),
    "AdaLoRA": (
        lambda: (Between(8, 3, "rA"),),
        [(T, 3), (T, IN)],
        {
            "sum_of_products": 2, "factor_gradients": 1, "scaled_factor": 3, "diagonal_gradients": 1, "mm": 2 + 2,
        },
    ),
    "galore": (
        lambda: (Projected(8), Projected(4)), [(T, 3), (T, 3)], {"sum_of_products": 3, "mm": 3 + 2, "stacked": 1},
    ),
    "galore on the left": (lambda: (Projected(8, 3, right=False),), [(T, IN)], {"sum_of_products": 3, "mm": 1 + 2}),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_step_keeps_and_computes_exactly_this(name):
    maps, kept, counts = COMPILED[name]
    net = Within(*maps())
    found = step(net, lead(T), pipeline=PIPELINE)
    assert found.shapes == kept  # never a weight, nor a stacked or scaled factor
    assert found.counts() == counts  # two of the plain products are that before the maps


def test_a_compiled_step_multiplies_no_more_than_its_minimum():
    sizes = [(8, 3), (4, 2), (5, 7)]
    net = Within(*(Map(*size) for size in sizes))
    found = step(net, lead(T), pipeline=PIPELINE)
    assert found.flops == 4 * T * IN * IN + sum(4 * T * IN * o + 6 * T * r * (IN + o) for o, r in sizes)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_float32_factors_beside_a_narrow_base_cost_no_cast_that_a_compiler_sees(narrow):
    net = Within(Map(8, 3, bias=True), Map(4, 2)).float()
    for each in net.maps:
        each.W.data = each.W.data.to(narrow)
    net.P.data = net.P.data.to(narrow)
    net.maps[0].b.data = net.maps[0].b.data.to(narrow)
    rows = 2000
    found = step(net, lead(rows, dtype=narrow), pipeline=PIPELINE)
    assert not [node for node in found.nodes() if node.target is torch.ops.aten._to_copy.default]
    assert found.bytes == 2 * rows * (IN + 3 + 2)
    gradients = [parameter.grad for name, parameter in net.named_parameters() if name.endswith(("A", "B"))]
    assert [None if each is None else each.dtype for each in gradients] == [torch.float32] * 4
