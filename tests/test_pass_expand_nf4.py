"""expand-nf4: nf4_linear as a gather from the code table, a product by block maxima and a linear map."""

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
from lrcompile.passes.expand_nf4 import ExpandNf4
from lrcompile.passes.pipeline import Pipeline

IN, HIDDEN, OUT = 10, 23, 7


def _program(model: nn.Module, *inputs: torch.Tensor) -> Program:
    return Program(capture(model, inputs).program, model)


def _counts(program: Program) -> dict[str, int]:
    targets = Counter(str(node.target) for node in program.exported.graph.nodes if node.op == "call_function")
    names = ("lrcompile.nf4_linear.default", "aten.embedding.default", "aten.index.Tensor", "aten.addmm.default",
             "aten.mm.default")  # fmt: skip
    return {name.split(".")[1]: targets[name] for name in names}


def _mlp(dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    model = nn.Sequential(nn.Linear(IN, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, OUT, bias=False)).to(dtype)
    return lrcompile.quantize(model, targets=["0", "2"], **fields).eval()


@pytest.mark.parametrize("double", [False, True])
def test_every_map_becomes_gathers_and_one_product(double):
    """One gather for the codes, one more for the maxima where these are codes too."""
    model, x = _mlp(double_quant=double), torch.randn(4, IN)
    program = _program(model, x)
    assert _counts(program) == {"nf4_linear": 2, "embedding": 0, "index": 0, "addmm": 0, "mm": 0}
    (step,) = Pipeline((ExpandNf4(),)).run(program, Check((torch.randn(9, IN),)))
    assert step.result.count == 2
    assert _counts(program) == {"nf4_linear": 0, "embedding": 2, "index": 2 * double, "addmm": 1, "mm": 1}
    assert not ExpandNf4().apply(program).modified


def test_the_code_tables_are_two_tensors_of_the_whole_program():
    program = _program(_mlp(), torch.randn(4, IN))
    before = set(program.exported.state_dict)
    ExpandNf4().apply(program)
    added = {name: tuple(t.shape) for name, t in program.exported.state_dict.items() if name not in before}
    assert added == {"nf4_pairs": (256, 2), "nf4_dynamic": (256,)}


def test_the_batch_still_varies_and_leading_dimensions_are_kept():
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = _mlp()

        def forward(self, x):
            return self.inner(x)

    model = Deep()
    program = _program(model, torch.randn(3, 5, IN))
    ExpandNf4().apply(program)
    for rows in (1, 3, 8):
        x = torch.randn(rows, 5, IN)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(x), model(x), rtol=1e-6, atol=16 * 2**-24 * HIDDEN)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("block_size", [32, 256])
def test_other_dtypes_and_a_short_last_block(dtype, block_size):
    assert IN * HIDDEN % block_size  # the last block is short
    x = torch.randn(4, IN, dtype=dtype)
    program = _program(_mlp(dtype, block_size=block_size), x)
    Pipeline((ExpandNf4(),)).run(program, Check((x,)))
    assert _counts(program)["nf4_linear"] == 0


def test_a_map_that_is_an_output_gives_its_place_to_the_product():
    model: Any = nn.Linear(IN, OUT)
    lrcompile.quantize(model, targets=".*")
    x = torch.randn(4, IN)
    program = _program(model, x)
    ExpandNf4().apply(program)
    assert program.exported.graph_signature.user_outputs[0] == program.exported.graph.output_node().args[0][0].name
    torch.export.export(program.module(), (x,))


def test_the_result_needs_no_operator_of_ours():
    program = _program(_mlp(), torch.randn(4, IN))
    ExpandNf4().apply(program)
    targets = {str(node.target) for node in program.exported.run_decompositions().graph.nodes}
    assert not any("lrcompile" in target for target in targets)


def test_a_program_without_nf4_is_left_alone():
    program = _program(nn.Linear(IN, OUT), torch.randn(4, IN))
    before, code = set(program.exported.state_dict), program.exported.graph_module.code
    assert ExpandNf4().apply(program).count == 0
    assert set(program.exported.state_dict) == before
    assert program.exported.graph_module.code == code
