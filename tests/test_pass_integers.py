"""expand-integers and integer-inputs: an integer map spelled in plain operations, or allowed to round its inputs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

import lrcompile
from lrcompile.deployment.capture import capture
from lrcompile.integers.blocks import quantize_integers, rounded_inputs
from lrcompile.integers.modules import IntegerLayout, attach_integers
from lrcompile.passes.base import Program
from lrcompile.passes.checking import Check
from lrcompile.passes.expand_integers import ExpandIntegers
from lrcompile.passes.integer_inputs import IntegerInputs
from lrcompile.passes.pipeline import Pipeline

IN, HIDDEN, OUT = 70, 23, 7


def _counts(program: Program) -> dict[str, int]:
    targets = Counter(str(node.target) for node in program.exported.graph.nodes if node.op == "call_function")
    names = ("lrcompile.integer_linear.default", "aten.linear.default")
    return {name.split(".")[1]: targets[name] for name in names}


def _mlp(dtype: torch.dtype = torch.float32) -> Any:
    model: Any = nn.Sequential(nn.Linear(IN, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, OUT, bias=False)).to(dtype)
    for index, bits, block in ((0, 8, 64), (2, 4, 32)):
        held = quantize_integers(model[index].weight, bits, block)
        out, inside = model[index].weight.shape
        attach_integers(model[index], held, IntegerLayout(out, inside, False, block, dtype, bits))
    return model.eval()


def _program(model: nn.Module, *inputs: torch.Tensor) -> Program:
    return Program(capture(model, inputs).program, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_integer_map_becomes_one_product_with_its_decoded_weight(dtype):
    model, x = _mlp(dtype), torch.randn(9, 2, IN, dtype=dtype)
    program = _program(model, x)
    assert _counts(program) == {"integer_linear": 2, "linear": 0}
    (step,) = Pipeline((ExpandIntegers(),)).run(program, Check((x,)))
    assert step.result.count == 2
    assert _counts(program) == {"integer_linear": 0, "linear": 2}
    assert not ExpandIntegers().apply(program).modified
    for rows in (1, 5):  # the batch still varies
        given = torch.randn(rows, 2, IN, dtype=dtype)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(given), model(given), rtol=1e-6, atol=1e-6)


def test_inputs_are_rounded_once_said_and_the_error_is_that_of_the_inputs():
    model, x = _mlp(), torch.randn(9, IN)
    program = _program(model, x)
    (step,) = Pipeline((IntegerInputs(),)).run(program, Check((x,)))
    assert step.result.count == 2
    assert set(step.result.errors.values()) == {0.5}
    assert _counts(program) == {"integer_linear": 2, "linear": 0}
    assert not IntegerInputs().apply(program).modified
    with torch.no_grad():
        hidden = nn.functional.gelu(nn.functional.linear(rounded_inputs(x, 64), model[0].weight, model[0].bias))
        wanted = nn.functional.linear(rounded_inputs(hidden, 32), model[2].weight)
        torch.testing.assert_close(program.module()(x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("each", [ExpandIntegers(), IntegerInputs()], ids=str)
def test_maps_that_are_no_integers_are_left_alone(each):
    model = nn.Sequential(nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, OUT))
    lrcompile.quantize(model, targets=["1"])
    program = _program(model, torch.randn(3, IN))
    code = program.exported.graph_module.code
    assert not each.apply(program).modified
    assert program.exported.graph_module.code == code
