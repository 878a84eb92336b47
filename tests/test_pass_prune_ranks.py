"""prune-ranks: rows and columns of the factors that add nothing go, and the sum is the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lrcompile
from lrcompile.deployment.capture import capture
from lrcompile.passes.base import Program
from lrcompile.passes.checking import Check
from lrcompile.passes.nodes import ADAPTERS
from lrcompile.passes.pipeline import Pipeline
from lrcompile.passes.prune_ranks import PruneRanks
from lrcompile.passes.tensors import Tensors

IN, OUT, RANK = 10, 7, 5


def _pruned(model: Any, *inputs: torch.Tensor, shapes: Any = None) -> tuple[Program, list[int]]:
    """The program after the pass, checked, and the rank of each adapter node."""
    program = Program(capture(model, inputs, shapes).program, model)
    Pipeline((PruneRanks(),)).run(program, Check(inputs))
    tensors = Tensors(program.exported)
    found = [node for node in program.exported.graph.nodes if node.target in ADAPTERS]
    return program, [tensors.value(node.args[2]).shape[-2] for node in found]  # type: ignore[union-attr]


def _adapted(model: Any, **fields: Any) -> tuple[Any, list[Any]]:
    lrcompile.apply(model, lrcompile.spec("lora", rank=RANK, **fields))
    found = [m for m in model.modules() if type(m).__name__ == "LoraAdapter"]
    for adapter in found:
        nn.init.normal_(adapter.A)
        nn.init.normal_(adapter.B)
    return model.eval(), found


@pytest.mark.parametrize(("rows", "columns", "left"), [((1, 3), (), 3), ((), (0,), 4), ((1,), (1, 4), 3), ((), (), 5)])
def test_zero_rows_and_columns_go(rows, columns, left):
    model, (adapter,) = _adapted(nn.Sequential(nn.Linear(IN, OUT)), targets=["0"])
    with torch.no_grad():
        adapter.A[list(rows)] = 0
        adapter.B[:, list(columns)] = 0
    assert _pruned(model, torch.randn(3, IN))[1] == [left]


def test_it_is_idempotent_and_leaves_one_rank_of_a_zero_adapter():
    model, (adapter,) = _adapted(nn.Sequential(nn.Linear(IN, OUT)), targets=["0"])
    nn.init.zeros_(adapter.B)
    program, ranks = _pruned(model, torch.randn(3, IN))
    assert ranks == [1]
    assert not PruneRanks().apply(program).modified


def test_a_stack_keeps_what_any_of_its_maps_needs():
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.W = nn.Parameter(torch.randn(2, OUT, IN))

        def forward(self, x):
            return x @ self.W.mT

    model, (adapter,) = _adapted(Stack(), targets=["W"])
    with torch.no_grad():
        adapter.A[:, 1] = 0
        adapter.B[0, :, 2] = 0
    assert _pruned(model, torch.randn(2, 3, IN), shapes="static")[1] == [4]


def test_projections_that_share_one_B_stay_slices_of_one():
    model, (adapter,) = _adapted(nn.MultiheadAttention(8, 2, batch_first=True), targets=["in_proj_weight"])
    with torch.no_grad():
        adapter.A[2] = 0
    x, y = torch.randn(2, 3, 8), torch.randn(2, 4, 8)
    program, ranks = _pruned(model, x, y, torch.randn(2, 4, 8))
    assert ranks == [4, 4, 4]
    assert sum(name.endswith("B_pruned") for name in program.exported.state_dict) == 1
