"""fuse-by-input: linear maps of one input become one product and a split, whatever their weights are stored as."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

import lrcompile
from lrcompile.deployment.capture import capture
from lrcompile.integers.blocks import quantize_integers
from lrcompile.integers.modules import IntegerLayout, attach_integers
from lrcompile.kernels.nf4_dequant import Nf4, dequantize_nf4
from lrcompile.passes.base import Program
from lrcompile.passes.checking import Check
from lrcompile.passes.fuse_by_input import FuseByInput
from lrcompile.passes.merge_adapters import MergeAdapters
from lrcompile.passes.pipeline import Pipeline

IN = 64


class Block(nn.Module):
    """Three maps of one input with and without bias, and two of another."""

    def __init__(self, inside: int = IN, widths: tuple[int, int, int] = (24, 8, 16)):
        super().__init__()
        self.q, self.k = nn.Linear(inside, widths[0]), nn.Linear(inside, widths[1], bias=False)
        self.v = nn.Linear(inside, widths[2])
        self.out = nn.Linear(sum(widths), inside)
        self.gate, self.up = nn.Linear(inside, 40, bias=False), nn.Linear(inside, 40, bias=False)

    def forward(self, x):
        x = torch.tanh(self.out(torch.cat([self.q(x), self.k(x).sigmoid(), self.v(x)], -1)))
        return self.gate(x).sigmoid() * self.up(x)


def _program(model: nn.Module, *inputs: torch.Tensor) -> Program:
    return Program(capture(model.eval(), inputs).program, model)


def _counts(program: Program) -> dict[str, int]:
    targets = Counter(str(node.target) for node in program.exported.graph.nodes if node.op == "call_function")
    names = ("aten.linear.default", "lrcompile.nf4_linear.default", "lrcompile.integer_linear.default",
             "aten.split_with_sizes.default")  # fmt: skip
    return {name.split(".")[1]: targets[name] for name in names}


def as_integers(model: Any) -> Any:
    for name in ("q", "k", "v", "gate", "up"):
        layer = model.get_submodule(name)
        held, (out, inside) = quantize_integers(layer.weight, 8, 64), layer.weight.shape
        attach_integers(layer, held, IntegerLayout(out, inside, False, 64, torch.float32, 8))
    return model


def as_nf4(model: Any, **options: Any) -> Any:
    return lrcompile.quantize(model, targets=["q", "k", "v", "gate", "up"], **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_float_maps_of_one_input_are_one_product(dtype):
    model, x = Block().to(dtype), torch.randn(5, 3, IN, dtype=dtype)
    program = _program(model, x)
    assert _counts(program) == {"linear": 6, "nf4_linear": 0, "integer_linear": 0, "split_with_sizes": 0}
    (step,) = Pipeline((FuseByInput(),)).run(program, Check((x,)))
    assert step.result.count == 5
    assert step.result.refusals == ()
    assert _counts(program) == {"linear": 3, "nf4_linear": 0, "integer_linear": 0, "split_with_sizes": 2}
    shapes = {name: tuple(weight.shape) for name, weight in program.pending.items()}
    assert shapes == {"q.weight_and_k.weight_and_v.weight": (48, IN), "gate.weight_and_up.weight": (80, IN)}
    bias = program.exported.state_dict["q.bias_and_v.bias"]
    assert torch.equal(bias, torch.cat([model.q.bias, torch.zeros(8, dtype=dtype), model.v.bias]).detach())
    code = program.exported.graph_module.code
    assert not FuseByInput().apply(program).modified
    assert program.exported.graph_module.code == code
    for rows in (1, 4):  # the batch still varies
        given = torch.randn(rows, 3, IN, dtype=dtype)
        tolerance = 2e-2 if dtype is torch.bfloat16 else 1e-5
        with torch.no_grad():
            torch.testing.assert_close(program.module()(given), model(given), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("double", [True, False])
def test_nf4_codes_that_fill_whole_blocks_are_stacked_bit_for_bit(double):
    model, x = as_nf4(Block(), double_quant=double), torch.randn(5, IN)
    program = _program(model, x)
    (step,) = Pipeline((FuseByInput(),)).run(program, Check((x,)))
    assert step.result.count == 5
    assert _counts(program) == {"linear": 1, "nf4_linear": 2, "integer_linear": 0, "split_with_sizes": 2}
    held = program.exported.state_dict
    name = "q.weight_codes_and_k.weight_codes_and_v.weight_codes"
    stacked = dequantize_nf4(Nf4(held[name], held[f"{name}_absmax"]), (48, IN), 64)
    assert torch.equal(stacked, torch.cat([model.q.weight, model.k.weight, model.v.weight]))


def test_nf4_codes_that_end_within_a_block_are_refused_but_for_one_at_the_end():
    """in = 20, block 64: 24·20 and 8·20 leave half a block, 16·20 = 5 blocks of 64."""
    model, x = as_nf4(Block(20)), torch.randn(5, 20)
    program = _program(model, x)
    (step,) = Pipeline((FuseByInput(),)).run(program, Check((x,)))
    assert len(step.result.refusals) == 2
    assert all("end within a block" in refusal.reason for refusal in step.result.refusals)
    assert step.result.count == 2  # v, which fills its blocks, and one that does not
    assert _counts(program)["nf4_linear"] == 4
    held = next(name for name in program.exported.state_dict if "_and_" in name and name.endswith("codes"))
    assert held == "v.weight_codes_and_q.weight_codes"


def test_integers_are_stacked_row_by_row():
    model, x = as_integers(Block(70)), torch.randn(5, 70)
    program = _program(model, x)
    (step,) = Pipeline((FuseByInput(),)).run(program, Check((x,)))
    assert step.result.count == 5
    assert _counts(program) == {"linear": 1, "nf4_linear": 0, "integer_linear": 2, "split_with_sizes": 2}


def test_a_folded_weight_is_stacked_when_it_is_computed_and_not_before():
    model: Any = lrcompile.apply(Block(), lrcompile.spec("lora", rank=2, targets=["q", "up"]))
    for name in ("q", "up"):
        nn.init.normal_(model.get_submodule(name).lrcompile_adapters["weight"]["default"].B)
    x = torch.randn(5, IN)
    program = _program(model, x)
    Pipeline((MergeAdapters(), FuseByInput())).run(program, Check((x,)))
    assert _counts(program)["linear"] == 3
    assert set(program.pending) == {"q.weight_and_k.weight_and_v.weight", "gate.weight_and_up.weight"}
    lrcompile.merge(model)
    wanted = torch.cat([model.q.weight, model.k.weight, model.v.weight])
    assert torch.equal(program.pending["q.weight_and_k.weight_and_v.weight"](), wanted)


class Other(nn.Module):
    """Maps that must stay: of different inputs, of a tied weight, of a computed one, of another dtype's storage."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.tied = nn.Linear(IN, IN), nn.Linear(IN, IN), nn.Linear(IN, IN, bias=False)
        self.computed = nn.Parameter(torch.randn(IN, IN))

    def forward(self, x):
        y = self.one(x)
        return self.two(y) + self.tied(self.tied(x)) + nn.functional.linear(x, self.computed * 2)


def test_maps_of_other_inputs_and_tied_and_computed_weights_are_left_with_a_reason():
    model, x = Other(), torch.randn(5, IN)
    program = _program(model, x)
    code = program.exported.graph_module.code
    result = FuseByInput().apply(program)
    assert not result.modified
    assert program.exported.graph_module.code == code
    reasons = [refusal.reason for refusal in result.refusals]
    assert sum("used elsewhere" in reason for reason in reasons) == 2
    assert sum("computed" in reason for reason in reasons) == 1


def test_a_conv1ds_codes_are_refused():
    transformers = pytest.importorskip("transformers")

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = transformers.pytorch_utils.Conv1D(64, IN), transformers.pytorch_utils.Conv1D(64, IN)

        def forward(self, x):
            return self.a(x) + self.b(x)

    program = _program(lrcompile.quantize(Two(), targets=["a", "b"]), torch.randn(3, IN))
    result = FuseByInput().apply(program)
    assert not result.modified
    assert all("[in, out]" in refusal.reason for refusal in result.refusals)
    assert len(result.refusals) == 2


@pytest.mark.slow
def test_a_llamas_attention_and_mlp_are_fused_and_run_in_onnx_runtime(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("onnxruntime")
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "use_cache": False}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()
    ids = torch.arange(10).view(2, 5)
    program = _program(model, ids)
    before = _counts(program)["linear"]
    Pipeline((FuseByInput(),)).run(program, Check((ids,)))
    assert before == 2 * 7 + 1
    assert _counts(program) == {"linear": 2 * 4 + 1, "nf4_linear": 0, "integer_linear": 0, "split_with_sizes": 4}
    written = torch.onnx.export(program.module(), (ids,), dynamo=True, verbose=False)
    assert written is not None
    (y,) = written(ids)
    with torch.no_grad():
        torch.testing.assert_close(y, model(ids).logits, rtol=1e-4, atol=1e-5)
