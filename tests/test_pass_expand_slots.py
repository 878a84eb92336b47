"""expand-slots: the same update with both factors the other way round, whatever the rank."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

import lrcompile
from lrcompile.deployment.capture import capture
from lrcompile.passes import parse
from lrcompile.passes.base import Program
from lrcompile.passes.checking import Check
from lrcompile.passes.expand_slots import ExpandSlots
from lrcompile.passes.pipeline import Pipeline

lora, gain = torch.ops.lrcompile.lora, torch.ops.lrcompile.gain
IN, OUT, RANK = 10, 7, 3


def _program(model: nn.Module, *inputs: torch.Tensor) -> Program:
    return Program(capture(model, inputs).program, model)


def _counts(program: Program) -> dict[str, int]:
    targets = Counter(str(node.target) for node in program.exported.graph.nodes if node.op == "call_function")
    return {name: targets[f"{name}.default"] for name in ("lrcompile.lora", "aten.matmul", "aten.linear")}


class Pair(nn.Module):
    """A map with an adapter; `how` calls the op."""

    def __init__(self, how: Any = None, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.how = how or (lambda net, y, x: lora(y, x, net.A, net.B, net.scale, 0.0))
        self.map = nn.Linear(IN, OUT, dtype=dtype)
        self.A, self.B = nn.Parameter(torch.randn(RANK, IN)), nn.Parameter(torch.randn(OUT, RANK))
        self.g = nn.Parameter(1 + 0.1 * torch.randn(OUT))
        self.register_buffer("scale", torch.tensor(0.7), persistent=False)

    def forward(self, x):
        return self.how(self, self.map(x), x)


def _twice(net: Any, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return lora(lora(y, x, net.A, net.B, net.scale, 0.0), x, net.A, net.B, net.scale, 0.0)


def _part(net: Any, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.cat((y[..., :2], lora(y[..., 2:], x, net.A, net.B[2:], net.scale, 0.0)), -1)


def _gained(net: Any, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return gain(lora(y, x, net.A, net.B, net.scale, 0.0), net.g, net.map.bias)


def test_factors_are_held_as_onnx_runtime_takes_them_with_the_scale_in_the_second():
    model, x = Pair(), torch.randn(4, IN)
    program = _program(model, x)
    assert _counts(program) == {"lrcompile.lora": 1, "aten.matmul": 0, "aten.linear": 1}
    Pipeline((ExpandSlots(),)).run(program, Check((torch.randn(5, IN),)))
    assert _counts(program) == {"lrcompile.lora": 0, "aten.matmul": 2, "aten.linear": 1}
    held = program.exported.state_dict
    assert torch.equal(held["lora_A"], model.A.T)
    assert torch.equal(held["lora_B"], (model.B * 0.7).T)
    assert not ExpandSlots().apply(program).modified


@pytest.mark.parametrize("how", [_twice, _part, _gained], ids=lambda how: how.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shared_factors_parts_of_them_and_gains_compute_the_same(how, dtype):
    program = _program(Pair(how, dtype), torch.randn(4, IN, dtype=dtype))
    (step,) = Pipeline((ExpandSlots(),)).run(program, Check((torch.randn(5, IN, dtype=dtype),)))
    assert step.result.count == 1 + (how is not _part)
    assert sum(name.startswith("lora_") for name in program.exported.state_dict) == 2


def test_a_lookup_reads_rows_and_experts_their_own_pairs():
    model: Any = nn.Sequential(nn.Embedding(11, IN))
    lrcompile.apply(model, lrcompile.spec("lora", rank=RANK, targets=["0"]))
    nn.init.normal_(model[0].lrcompile_adapters.weight.default.A)
    ids = torch.arange(6).view(2, 3)
    program = _program(model.eval(), ids)
    (step,) = Pipeline((ExpandSlots(),)).run(program, Check((ids,)))
    assert step.result.count == 1


class Experts(nn.Module):
    """An index of 4 is no expert's."""

    def __init__(self) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(torch.randn(4, RANK, IN)), nn.Parameter(torch.randn(4, OUT, RANK))
        self.register_buffer("scale", torch.tensor(0.7), persistent=False)

    def forward(self, y, x, index):
        return torch.ops.lrcompile.lora_experts(y, x, self.A, self.B, self.scale, index, 0.0)


def test_rows_of_experts_take_their_own_pair_and_those_of_none_keep_their_base():
    given = (torch.randn(6, OUT), torch.randn(6, IN), torch.tensor([0, 3, 4, 1, 4, 2]))
    program = _program(Experts(), *given)
    Pipeline((ExpandSlots(),)).run(program, Check(given))
    assert torch.equal(program.module()(*given)[2], given[0][2])


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (lambda net, y, x: lora(y, x, net.A, net.B, net.scale, 0.5), "dropout"),
        (lambda net, y, x: lora(y, x, net.A * 2, net.B, net.scale, 0.0), "computed"),
        (lambda net, y, x: lora(y, x, net.A, net.B * 2, net.scale, 0.0), "computed"),
        (lambda net, y, x: gain(y, net.g * 2), "computed"),
        (lambda net, y, x: torch.ops.lrcompile.hadamard(y, x, net.A, net.B, net.scale, net.map.weight), "as large"),
    ],
)
def test_what_has_no_such_form_stays_and_says_why(how, reason):
    program = _program(Pair(how), torch.randn(4, IN))
    code = program.exported.graph_module.code
    result = ExpandSlots().apply(program)
    assert not result.modified
    assert reason in result.refusals[0].reason
    assert program.exported.graph_module.code == code


def test_a_program_without_adapters_is_left_alone():
    program = _program(nn.Linear(IN, OUT), torch.randn(4, IN))
    assert not ExpandSlots().apply(program).modified
    assert str(parse("expand-slots")) == "expand-slots"
