"""Each map of a group gets the order of products that takes the least time, where it is free to choose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from zoo.training import captured, rewriting, step, targets

from lrcompile.kernels.nf4_dequant import quantize_nf4
from lrcompile.lowered.bases import Quantized
from lrcompile.lowered.contractions import MACHINES, Order, Shapes, cheapest
from lrcompile.lowered.contractions import flops as predicted
from lrcompile.lowered.group import AdaptedGroup
from lrcompile.passes.group_by_input import GroupByInput
from lrcompile.passes.order_contractions import OrderContractions, products_by_codes
from lrcompile.passes.pipeline import Pipeline
from lrcompile.passes.replay_dropout import ReplayDropout

lora = torch.ops.lrcompile.lora
PIPELINE = Pipeline((ReplayDropout(), GroupByInput(), OrderContractions()))
ROWS, IN, OUT = 512, 48, 40
SPLIT, MERGED = Order(), Order(merged=True)


class Net(nn.Module):
    def __init__(self, *ranks: int, dtype: torch.dtype = torch.float32, p: float = 0.0):
        super().__init__()
        self.p, self.n = p, len(ranks)
        for i, rank in enumerate(ranks):
            self.register_buffer(f"W{i}", torch.randn(OUT, IN, dtype=dtype))
            self.register_parameter(f"A{i}", nn.Parameter(torch.randn(rank, IN, dtype=dtype) / IN))
            self.register_parameter(f"B{i}", nn.Parameter(torch.randn(OUT, rank, dtype=dtype) / rank))
        self.register_buffer("scale", torch.tensor(0.7))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        ys = []
        for i in range(self.n):
            W, A, B = (getattr(self, f"{name}{i}") for name in "WAB")
            ys.append(lora(F.linear(x, W), x, A, B, self.scale, self.p))
        return tuple(ys)


def lead(rows: int = ROWS, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, IN, dtype=dtype, requires_grad=True)


def orders(function: Callable[..., Any], x: Tensor, dynamic: bool = False) -> list[Order]:
    (graph,) = captured(function, x, dynamic=dynamic)
    for each in PIPELINE:
        each.apply(graph)
    (group,) = (target for target in targets(graph) if isinstance(target, AdaptedGroup))
    assert not OrderContractions().apply(graph).modified, "the pass is not idempotent"
    assert [target for target in targets(graph) if isinstance(target, AdaptedGroup)] == [group]
    return [member.order for member in group.members]


def chosen(rank: int, rows: int = ROWS, dtype: torch.dtype = torch.float32) -> Order:
    return cheapest(Shapes(rows, IN, OUT, rank), MACHINES["cpu", dtype], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 4, 16, 64])
def test_the_order_is_the_cheapest_of_the_model(rank, dtype):
    assert orders(Net(rank, dtype=dtype), lead(dtype=dtype)) == [chosen(rank, dtype=dtype)]


def test_the_maps_of_a_group_choose_for_themselves():
    """A thousand columns, so that products are bound by their arithmetic; nothing is computed."""
    net = Net(16, 512)
    for name, (out, inside) in {"W": (1000, 1024), "A": (0, 1024), "B": (1000, 0)}.items():
        for i in range(2):
            old = getattr(net, f"{name}{i}")
            shape = (out or old.shape[0], inside or old.shape[1])
            setattr(net, f"{name}{i}", torch.zeros(shape) if name == "W" else nn.Parameter(torch.zeros(shape)))
    found = orders(net, torch.zeros(2048, 1024, requires_grad=True))
    assert found[0] == SPLIT
    assert found[1].merged


def test_few_rows_keep_the_factors_and_many_merge_them():
    assert orders(Net(16), lead(2)) == [SPLIT]
    assert orders(Net(16), lead(4096))[0].merged


@pytest.mark.parametrize(
    ("net", "dtype"),
    [
        (lambda: Net(64, dtype=torch.bfloat16), torch.bfloat16),  # would round s·B·A away
        (lambda: Net(64, p=0.5), torch.float32),  # the factors see another input than W
    ],
    ids=["bfloat16", "dropout"],
)
def test_where_merging_changes_the_function_it_is_not_chosen(net, dtype):
    assert orders(net(), lead(4096, dtype)) == [SPLIT]


def test_a_shared_A_keeps_the_factors():
    net = Net(64, 64)
    net.A1 = net.A0
    assert orders(net, lead(4096)) == [SPLIT, SPLIT]


def test_under_autocast_the_factors_are_kept():
    with torch.autocast("cpu", torch.bfloat16):
        assert orders(Net(64), lead(4096)) == [SPLIT]


def test_symbolic_rows_count_as_what_they_were_without_a_guard():
    net = Net(16)
    assert orders(net, lead(4096), dynamic=True)[0].merged
    torch._dynamo.reset()
    graphs: list[fx.GraphModule] = []
    compiled = torch.compile(net, backend=rewriting(PIPELINE, graphs), dynamic=True)
    for rows in (4096, 3, 77):  # one graph for all, right for each
        x = lead(rows)
        torch.testing.assert_close(compiled(x), net(x), rtol=1e-5, atol=1e-4)
    assert len(graphs) == 1


@pytest.mark.parametrize("rank", [1, 16, 64])
def test_a_compiled_step_costs_what_was_predicted_and_gives_the_same_gradients(rank):
    net, x = Net(rank, dtype=torch.float64), lead(dtype=torch.float64)
    found = step(net, x, pipeline=PIPELINE)
    order = chosen(rank, dtype=torch.float64)
    assert found.flops == predicted(Shapes(ROWS, IN, OUT, rank), order)
    torch._dynamo.reset()
    gradients = []
    for run in (net, torch.compile(net, backend=rewriting(PIPELINE), dynamic=False)):
        (y,) = run(x)
        dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        gradients.append((y, *torch.autograd.grad(y, (x, *net.parameters()), dy)))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-11)


def test_few_rows_of_an_NF4_base_are_multiplied_by_its_codes_on_a_GPU_and_many_are_not():
    base = Quantized(4096, 4096, 64, False, torch.bfloat16)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert [products_by_codes(base, rows, gpu) for rows in (1, 16, 64, 8192)] == [True, True, True, False]
    assert not products_by_codes(base, 1, cpu)
    assert not products_by_codes(replace(base, compute_dtype=torch.float32), 1, gpu)


def test_a_product_by_codes_keeps_no_weight_between_the_passes(monkeypatch):
    monkeypatch.setattr("lrcompile.passes.order_contractions.products_by_codes", lambda base, rows, device: True)
    held = quantize_nf4(torch.randn(OUT, IN))
    net, M = Net(3), torch.randn(IN, IN)

    def quantized(x: Tensor) -> Tensor:
        h = x @ M
        y = torch.ops.lrcompile.nf4_linear(h, *held, None, OUT, IN, 64, False, torch.float32)
        return lora(y, h, net.A0, net.B0, net.scale)

    found = step(quantized, lead(), pipeline=PIPELINE)
    assert found.shapes == [(ROWS, 3), (ROWS, IN)]
    assert found.counts() == {"nf4_linear": 2, "sum_of_products": 1, "factor_gradients": 1, "addmm": 1, "mm": 2 + 2}


def test_graphs_without_groups_are_left():
    (graph,) = captured(lambda x: x.sin(), lead())
    assert not OrderContractions().apply(graph).modified
