"""dequantize-nf4: x·(c[q]·m)ᵀ = xWᵀ where an adapter waits to be folded into W; W is computed when it is written."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

import lrcompile
from lrcompile import SpecError
from lrcompile.deployment.capture import capture
from lrcompile.passes.base import Program
from lrcompile.passes.checking import Check
from lrcompile.passes.dequantize_nf4 import DTYPES, DequantizeNf4
from lrcompile.passes.merge_lora import MergeLora
from lrcompile.passes.pipeline import Pipeline
from lrcompile.quantizing import nf4_weight

IN, HIDDEN, OUT, RANK = 10, 23, 7, 3


def _program(model: nn.Module, *inputs: torch.Tensor) -> Program:
    return Program(capture(model, inputs).program, model)


def _counts(program: Program) -> dict[str, int]:
    targets = Counter(str(node.target) for node in program.exported.graph.nodes if node.op == "call_function")
    names = ("lrcompile.nf4_linear.default", "aten.linear.default", "lrcompile.lora.default")
    return {name.split(".")[1]: targets[name] for name in names}


def _adapted(model: nn.Module, *targets: str, quantized: tuple[str, ...] = (), **fields: Any) -> Any:
    lrcompile.quantize(model, targets=list(quantized or targets), **fields)
    lrcompile.apply(model, lrcompile.spec("lora", rank=RANK, alpha=5, targets=list(targets)))
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(IN, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, OUT, bias=False))


@pytest.mark.parametrize("into", DTYPES)
def test_adapted_maps_become_linear_maps_in_the_dtype_asked_for(into):
    model, x = _adapted(_mlp(), "0", "2"), torch.randn(4, IN)
    program = _program(model, x)
    assert _counts(program) == {"nf4_linear": 2, "linear": 0, "lora": 2}
    Pipeline((DequantizeNf4(into),)).run(program, Check((torch.randn(9, IN),)))
    assert _counts(program) == {"nf4_linear": 0, "linear": 2, "lora": 2}
    assert {name: weight.dtype for name, weight in program.pending.items()} == dict.fromkeys(
        ("0.weight", "2.weight"), DTYPES[into]
    )
    assert torch.equal(program.pending["0.weight"](), nf4_weight(model[0]).to(DTYPES[into]))
    assert not DequantizeNf4(into).apply(program).modified


def test_a_map_without_an_adapter_keeps_its_codes():
    model = _adapted(_mlp(), "2", quantized=("0", "2"))
    program = _program(model, torch.randn(4, IN))
    assert DequantizeNf4().apply(program).count == 1
    assert list(program.pending) == ["2.weight"]
    assert _counts(program)["nf4_linear"] == 1
    plain: Any = lrcompile.quantize(_mlp(), targets=["0"])
    assert not DequantizeNf4().apply(_program(plain, torch.randn(4, IN))).modified


def test_until_it_is_written_a_weight_takes_no_memory():
    model = _adapted(_mlp(), "0", "2")
    program = _program(model, torch.randn(4, IN))
    DequantizeNf4().apply(program)
    assert program.exported.state_dict["0.weight"].untyped_storage().nbytes() == 4
    program.module()
    assert program.exported.state_dict["0.weight"].untyped_storage().nbytes() == 4
    assert list(program.pending) == ["0.weight", "2.weight"]


@pytest.mark.parametrize("into", ["float32", "bfloat16"])
def test_what_waited_can_now_be_folded(into):
    model, x = _adapted(_mlp(), "0", "2"), torch.randn(4, IN)
    program = _program(model, x)
    Pipeline((DequantizeNf4(into), MergeLora())).run(program, Check((x,)))
    assert _counts(program) == {"nf4_linear": 0, "linear": 2, "lora": 0}
    pair = model[2].lrcompile_adapters["weight"]["default"]
    expected = nf4_weight(model[2]) + pair.delta()  # in float32, rounded once
    assert torch.equal(program.pending["2.weight"](), expected.to(DTYPES[into]))


def test_a_layer_called_twice_has_one_weight_afterwards():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = nn.Linear(IN, IN)

        def forward(self, x):
            return self.step(torch.tanh(self.step(x)))

    model, x = _adapted(Twice(), "step"), torch.randn(4, IN)
    program = _program(model, x)
    steps = Pipeline((DequantizeNf4(), MergeLora())).run(program, Check((x,)))
    assert [step.result.count for step in steps] == [2, 2]
    assert list(program.pending) == ["step.weight"]


def test_the_other_storage_order():
    transformers = pytest.importorskip("transformers")
    model, x = _adapted(nn.Sequential(transformers.pytorch_utils.Conv1D(OUT, IN)), "0"), torch.randn(4, IN)
    program = _program(model, x)
    Pipeline((DequantizeNf4("bfloat16"), MergeLora())).run(program, Check((x,)))
    assert program.pending["0.weight"].shape == (IN, OUT)


def test_a_bias_in_another_dtype_than_the_activations_is_cast():
    model = _adapted(nn.Sequential(nn.Linear(IN, OUT)), "0", compute_dtype="float32")
    x = torch.randn(4, IN, dtype=torch.bfloat16)
    program = _program(model, x)
    DequantizeNf4().apply(program)
    with torch.no_grad():
        found, expected = program.module()(x), model(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=4 * 2**-8, atol=4 * 2**-8 * float(expected.abs().max()))


def test_bad_dtypes_are_refused_with_the_choices():
    with pytest.raises(SpecError, match="into='int8' is not valid: choose one of 'float32', 'bfloat16', 'float16'"):
        DequantizeNf4("int8")
