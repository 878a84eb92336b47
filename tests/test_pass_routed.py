"""Folding a pair into a stack of experts: W'_e = W_e + s·B_e·A_e, wherever each row's expert chooses its weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

from lrcompile import dialect as dialect  # registers torch.ops.lrcompile
from lrcompile.deployment.capture import capture
from lrcompile.passes.base import Program
from lrcompile.passes.merge_lora import MergeLora
from lrcompile.passes.nodes import EXPERTS

lora_experts = torch.ops.lrcompile.lora_experts
COUNT, IN, OUT, RANK = 4, 5, 7, 3


def _draw(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, dtype=torch.float64))


class Routed(nn.Module):
    """One expert a row, its weight gathered; `body` says how the base's rows are made."""

    def __init__(self, body: Any, transposed: bool = False, dropout: float = 0.0):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.dropout = body, dropout
        self.W = _draw(COUNT, IN, OUT) if transposed else _draw(COUNT, OUT, IN)
        self.bias = _draw(COUNT, OUT)
        self.A, self.B = _draw(COUNT, RANK, IN), _draw(COUNT, OUT, RANK)
        self.register_buffer("scale", torch.tensor(0.7), persistent=False)

    def forward(self, x, experts):
        y = self.body(self, x, experts)
        return lora_experts(y, x, self.A, self.B, self.scale, experts, self.dropout)


def _rows(net: Any, x: Any, experts: Any) -> Any:
    return torch.bmm(net.W[experts], x.unsqueeze(-1)).squeeze(-1)


def _columns(net: Any, x: Any, experts: Any) -> Any:
    return torch.bmm(x.unsqueeze(1), net.W[experts]).squeeze(1)


def _inputs(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, IN, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, COUNT, (rows,), generator=generator)


def _folded(net: nn.Module) -> tuple[Program, Any]:
    rows = {0: Dim.DYNAMIC}
    program = Program(capture(net, _inputs(6), (rows, rows)).program, net)
    result = MergeLora().apply(program)
    assert not MergeLora().apply(program).modified, "the pass is not idempotent"
    return program, result


@pytest.mark.parametrize(
    ("body", "transposed"),
    [
        (_rows, False),
        (_columns, True),
        (lambda net, x, experts: _rows(net, x, experts) + net.bias[experts], False),
        (lambda net, x, experts: _columns(net, x, experts) + net.bias[experts], True),
    ],
)
def test_a_pair_is_folded_into_each_experts_weight(body, transposed):
    net = Routed(body, transposed)
    program, result = _folded(net)
    assert result.count == 1
    assert not result.refusals
    assert all(node.target is not EXPERTS for node in program.exported.graph.nodes)
    (pending,) = program.pending.values()
    delta = 0.7 * torch.stack([net.B[e] @ net.A[e] for e in range(COUNT)]).detach()
    expected = net.W.detach() + (delta.mT if transposed else delta)
    torch.testing.assert_close(pending(), expected, rtol=0, atol=1e-7)  # the scale is held in float32
    program.compute()
    x, experts = _inputs(9)
    got, want = program.exported.module()(x, experts), net(x, experts).detach()
    assert float((got - want).abs().max()) < 1e-6 * float(want.abs().max())


def test_two_pairs_of_one_stack_are_folded_in_turn():
    class Twice(Routed):
        def forward(self, x, experts):
            first = super().forward(x, experts)
            return lora_experts(first, x, 2 * self.A, self.B, self.scale, experts, 0.0)

    net = Twice(_rows)
    program, result = _folded(net)
    assert result.count == 2
    program.compute()
    x, experts = _inputs(9)
    torch.testing.assert_close(program.exported.module()(x, experts), net(x, experts), rtol=0, atol=1e-5)


def test_a_base_output_that_is_read_a_second_time_without_the_adapter_keeps_it():
    class Again(Routed):
        def forward(self, x, experts):
            y = _rows(self, x, experts)
            return lora_experts(y, x, self.A, self.B, self.scale, experts, 0.0) + y

    _, result = _folded(Again(_rows))
    assert result.count == 0
    assert "second time" in result.refusals[0].reason


@pytest.mark.parametrize(
    ("body", "dropout", "reason"),
    [
        (lambda net, x, experts: x @ net.W[0].T, 0.0, "no gathered product"),
        (lambda net, x, experts: _rows(net, x, (experts + 1) % COUNT), 0.0, "other experts"),
        (lambda net, x, experts: _rows(net, x.flip(-1), experts), 0.0, "another input"),
        (lambda net, x, experts: _rows(net, x, experts) + net.bias[(experts + 1) % COUNT], 0.0, "bias"),
        (lambda net, x, experts: torch.bmm((2 * x[:, :1, None]) * net.W[experts], x.unsqueeze(-1)).squeeze(-1), 0.0,
         "gathered weights"),
        (_rows, 0.1, "dropout is active"),
    ],
)  # fmt: skip
def test_where_folding_would_change_the_model_the_pair_stays_and_says_why(body, dropout, reason):
    program, result = _folded(Routed(body, dropout=dropout))
    assert result.count == 0
    assert reason in result.refusals[0].reason
    assert any(node.target is EXPERTS for node in program.exported.graph.nodes)


def test_a_stack_that_is_read_elsewhere_too_keeps_its_numbers_there():
    class Both(Routed):
        def forward(self, x, experts):
            return super().forward(x, experts), _rows(self, x, experts)

    net = Both(_rows)
    program, result = _folded(net)
    assert result.count == 1
    program.compute()
    x, experts = _inputs(9)
    for got, want in zip(program.exported.module()(x, experts), net(x, experts), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
