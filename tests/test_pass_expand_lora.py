"""expand-lora: lora(y, x, A, B, s) as linear, mul, linear, add: the op's own operations, so the same bits."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

import lrcompile
from lrcompile.deployment.capture import capture
from lrcompile.passes.base import Program
from lrcompile.passes.checking import Check
from lrcompile.passes.expand_lora import ExpandLora
from lrcompile.passes.fold_scale import FoldScale
from lrcompile.passes.pipeline import Pipeline

lora = torch.ops.lrcompile.lora
IN, OUT, RANK = 10, 7, 3


def _program(model: nn.Module, *inputs: torch.Tensor) -> Program:
    return Program(capture(model, inputs).program, model)


def _counts(program: Program) -> dict[str, int]:
    targets = Counter(str(node.target) for node in program.exported.graph.nodes if node.op == "call_function")
    names = ("lrcompile.lora.default", "aten.linear.default", "aten.mul.Tensor", "aten.add.Tensor", "aten.to.dtype")
    return {name.split(".")[1]: targets[name] for name in names}


class Pair(nn.Module):
    """A map with an adapter; `how` calls the op."""

    def __init__(self, how: Any = None, dtype: torch.dtype = torch.float32, factors: torch.dtype = torch.float32):
        super().__init__()
        self.how = how or (lambda net, y, x: lora(y, x, net.A, net.B, net.scale, 0.0))
        self.map = nn.Linear(IN, OUT, dtype=dtype)
        self.A, self.B = (nn.Parameter(torch.randn(*shape, dtype=factors)) for shape in ((RANK, IN), (OUT, RANK)))
        self.register_buffer("scale", torch.tensor(0.7), persistent=False)

    def forward(self, x):
        return self.how(self, self.map(x), x)


def test_one_node_becomes_two_products_a_scaling_and_a_sum():
    model, x = Pair(), torch.randn(4, IN)
    program = _program(model, x)
    assert _counts(program) == {"lora": 1, "linear": 1, "mul": 0, "add": 0, "to": 0}
    assert ExpandLora().apply(program).count == 1
    assert _counts(program) == {"lora": 0, "linear": 3, "mul": 1, "add": 1, "to": 0}
    assert not ExpandLora().apply(program).modified
    for rows in (1, 4, 9):
        given = torch.randn(rows, IN)
        with torch.no_grad():
            assert torch.equal(program.module()(given), model(given))


def test_a_scale_of_one_costs_nothing():
    program = _program(Pair(), torch.randn(4, IN))
    Pipeline((FoldScale(), ExpandLora())).run(program, Check((torch.randn(5, IN),)))
    assert _counts(program) == {"lora": 0, "linear": 3, "mul": 0, "add": 1, "to": 0}


def test_stacked_adapters_expand_each():
    def twice(net, y, x):
        return lora(lora(y, x, net.A, net.B, net.scale, 0.0), x, net.A * 2, net.B, net.scale, 0.0)

    program = _program(Pair(twice), torch.randn(4, IN))
    (step,) = Pipeline((ExpandLora(),)).run(program, Check((torch.randn(5, IN),)))
    assert step.result.count == 2
    assert _counts(program)["linear"] == 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_scale_is_cast_once_to_the_dtype_of_the_output(dtype):
    x = torch.randn(4, IN, dtype=dtype)
    model = Pair(dtype=dtype, factors=dtype)
    program = _program(model, x)
    Pipeline((ExpandLora(),)).run(program, Check((x,)))
    assert _counts(program) == {"lora": 0, "linear": 3, "mul": 1, "add": 1, "to": 1}
    (product,) = [node for node in program.exported.graph.nodes if node.target is torch.ops.aten.mul.Tensor]
    assert product.meta["val"].dtype == dtype


def _stack(net, y, x):
    A, B = (factor.unsqueeze(0).repeat(2, 1, 1) for factor in (net.A, net.B))
    pair = (each.unsqueeze(0).repeat(2, 1, 1) for each in (y, x))
    return lora(*pair, A, B, net.scale, 0.0)


LEFT: dict[str, Any] = {
    "active dropout": lambda: Pair(lambda net, y, x: lora(y, x, net.A, net.B, net.scale, 0.5)),
    "a stack of maps": lambda: Pair(_stack),
    "float32 factors on a bfloat16 base": lambda: Pair(dtype=torch.bfloat16),
    "no adapter": lambda: nn.Linear(IN, OUT),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_the_ops_own_decomposition_must_do_is_left_to_it(case):
    model = LEFT[case]()
    base = model.map if isinstance(model, Pair) else model
    program = _program(model, torch.randn(4, IN, dtype=base.weight.dtype))
    code = program.exported.graph_module.code
    assert not ExpandLora().apply(program).modified
    assert program.exported.graph_module.code == code
    targets = {str(node.target) for node in program.exported.run_decompositions().graph.nodes}
    assert not any("lrcompile" in target for target in targets)


def test_a_lookup_is_left_to_its_own_decomposition():
    model: Any = lrcompile.apply(nn.Sequential(nn.Embedding(11, IN)), lrcompile.spec("lora", rank=RANK, targets=["0"]))
    program = _program(model.eval(), torch.arange(6).view(2, 3))
    assert not ExpandLora().apply(program).modified


def test_an_adapter_that_is_an_output_gives_its_place_to_the_sum():
    def both(net, y, x):
        return {"base": y, "adapted": lora(y, x, net.A, net.B, net.scale, 0.0)}

    model, x = Pair(both), torch.randn(4, IN)
    program = _program(model, x)
    Pipeline((ExpandLora(),)).run(program, Check((x,)))
    assert list(program.module()(x)) == ["base", "adapted"]
    assert program.exported.graph_signature.user_outputs[1] == program.exported.graph.output_node().args[0][1].name
