"""fold-factors: what a form computes of its tensors at each call becomes a tensor, bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import lrcompile
from lrcompile.deployment.capture import capture
from lrcompile.passes.base import Program
from lrcompile.passes.checking import Check
from lrcompile.passes.fold_factors import FoldFactors
from lrcompile.passes.nodes import LORA, adapted_sites
from lrcompile.passes.pipeline import Pipeline

IN, MIDDLE, OUT, RANK = 9, 7, 11, 3


def _model(method: str = "vera", **fields: Any) -> Any:
    model = nn.Sequential(nn.Linear(IN, MIDDLE), nn.Tanh(), nn.Linear(MIDDLE, OUT), nn.Linear(OUT, 2))
    lrcompile.apply(model, lrcompile.spec(method, rank=RANK, targets=["0", "2"], **fields))
    for name, parameter in model.named_parameters():
        if "lrcompile_adapters" in name and parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def _program(model: nn.Module) -> Program:
    return Program(capture(model, (torch.randn(4, IN),)).program, model)


def _factors(program: Program) -> list[Any]:
    return [node.args[index] for node in program.exported.graph.nodes if node.target is LORA for index in (2, 3)]


def test_computed_factors_become_held_tensors_and_nothing_is_computed_any_more():
    """Before: slice of A, λ_b·B·λ_d at each of two sites; Expected: two lora nodes on four placeholders."""
    program = _program(_model())
    assert all(factor.op == "call_function" for factor in _factors(program))
    Pipeline((FoldFactors(),)).run(program, Check((torch.randn(5, IN),)))
    factors = _factors(program)
    assert [factor.op for factor in factors] == ["call_function", "placeholder"] * 2  # A is a slice, B a tensor
    assert {str(n.target) for n in program.exported.graph.nodes if n.op == "call_function"} <= {
        "aten.linear.default", "aten.tanh.default", "lrcompile.lora.default", "aten.slice.Tensor", "aten.alias.default",
    }  # fmt: skip


def test_sites_keep_their_names():
    program = _program(_model())
    FoldFactors().apply(program)
    assert adapted_sites(program.exported) == ["0", "2"]


def test_it_is_idempotent():
    program = _program(_model())
    assert FoldFactors().apply(program).modified
    assert not FoldFactors().apply(program).modified


def test_plain_pairs_are_left_alone():
    assert not FoldFactors().apply(_program(_model("lora"))).modified


def test_the_model_is_never_changed():
    model = _model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    FoldFactors().apply(_program(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_merging_then_leaves_the_products_alone():
    from lrcompile.passes.merge_lora import MergeLora

    program = _program(_model())
    Pipeline((FoldFactors(), MergeLora())).run(program, Check((torch.randn(5, IN),)))
    operations = [str(node.target) for node in program.exported.graph.nodes if node.op == "call_function"]
    assert operations == ["aten.linear.default", "aten.tanh.default", "aten.linear.default", "aten.linear.default"]
