"""integers-from-nf4: NF4 codes become integers a runtime multiplies by; within what the pass states, and once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

import lrcompile
from lrcompile import SpecError, passes
from lrcompile.deployment.capture import capture
from lrcompile.integers.blocks import quantize_integers
from lrcompile.nf4.modules import nf4_weight
from lrcompile.passes.base import Program
from lrcompile.passes.checking import Check
from lrcompile.passes.integers_from_nf4 import IntegersFromNf4
from lrcompile.passes.pipeline import Pipeline

IN, HIDDEN, OUT = 40, 23, 7


def _program(model: nn.Module, *inputs: torch.Tensor) -> Program:
    return Program(capture(model, inputs).program, model)


def _counts(program: Program) -> dict[str, int]:
    targets = Counter(str(node.target) for node in program.exported.graph.nodes if node.op == "call_function")
    names = ("lrcompile.nf4_linear.default", "lrcompile.integer_linear.default", "aten.linear.default")
    return {name.split(".")[1]: targets[name] for name in names}


def _mlp(dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    model = nn.Sequential(nn.Linear(IN, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, OUT, bias=False)).to(dtype)
    return lrcompile.quantize(model, targets=["0", "2"], **fields).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_every_nf4_map_becomes_one_on_integers_within_what_is_stated(bits, double, dtype):
    model, x = _mlp(dtype, double_quant=double), torch.randn(9, IN, dtype=dtype)
    program = _program(model, x)
    assert _counts(program) == {"nf4_linear": 2, "integer_linear": 0, "linear": 0}
    each = IntegersFromNf4(bits, 16)
    (step,) = Pipeline((each,)).run(program, Check((x,)))
    assert _counts(program) == {"nf4_linear": 0, "integer_linear": 2, "linear": 0}
    assert list(step.result.errors) == ["0.weight", "2.weight"]
    assert all(0.05 < error <= IntegersFromNf4.tolerance for error in step.result.errors.values())
    held = program.exported.state_dict
    wanted = quantize_integers(nf4_weight(model[0]), bits, 16)
    assert torch.equal(held[f"0.weight_int{bits}"], wanted.codes)
    assert torch.equal(held["0.weight_scales"], wanted.scales)
    assert not any(name.endswith(("_codes", "_absmax")) for name in _used(program))
    code = program.exported.graph_module.code
    assert not each.apply(program).modified
    assert program.exported.graph_module.code == code


def _used(program: Program) -> set[str]:
    return {node.name for node in program.exported.graph.nodes if node.op == "placeholder" and node.users}


def test_float_maps_and_other_operations_are_left_alone():
    model = nn.Sequential(nn.Linear(IN, HIDDEN), nn.GELU())
    program = _program(model, torch.randn(3, IN))
    code = program.exported.graph_module.code
    assert not IntegersFromNf4().apply(program).modified
    assert program.exported.graph_module.code == code


def test_a_layer_called_twice_is_stored_once_and_a_conv1d_is_turned_round():
    transformers = pytest.importorskip("transformers")

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = transformers.pytorch_utils.Conv1D(IN, IN)

        def forward(self, x):
            return self.step(torch.tanh(self.step(x)))

    model: Any = lrcompile.quantize(Twice(), targets=["step"])
    x = torch.randn(4, IN)
    program = _program(model, x)
    assert IntegersFromNf4(8, 32).apply(program).count == 2
    assert _counts(program)["integer_linear"] == 2
    assert sum(name.endswith("_int8") for name in program.exported.state_dict) == 1
    with torch.no_grad():
        y, exact = program.module()(x), model(x)
    assert 0 < float((y - exact).norm() / exact.norm()) < 0.05


def test_inputs_are_rounded_only_where_the_runtime_may():
    model, x = _mlp(), torch.randn(4, IN)
    outputs = []
    for rounded in (True, False):
        program = _program(model, x)
        IntegersFromNf4(8, 32, rounded).apply(program)
        with torch.no_grad():
            outputs.append(program.module()(x))
    assert not torch.equal(*outputs)


def test_it_is_run_by_name_and_wrong_options_are_refused():
    (each,) = passes.parse("integers-from-nf4{bits=4,block-size=64,integer-inputs=false}")
    assert each == IntegersFromNf4(4, 64, False)
    assert str(each) == "integers-from-nf4{bits=4,block-size=64,integer-inputs=false}"
    with pytest.raises(SpecError, match="bits=3"):
        IntegersFromNf4(3)
    with pytest.raises(SpecError, match="block_size=48"):
        IntegersFromNf4(8, 48)
