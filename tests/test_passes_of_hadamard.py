"""W ⊙ BA in a captured program: folded into W, or one held matrix beside it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from lrcompile.deployment.capture import capture
from lrcompile.dialect import hadamard as registers  # noqa: F401
from lrcompile.passes.base import Pass, Program, Result
from lrcompile.passes.checking import Check
from lrcompile.passes.drop_zero_adapters import DropZeroAdapters
from lrcompile.passes.expand_hadamard import ExpandHadamard
from lrcompile.passes.fold_scale import FoldScale
from lrcompile.passes.merge_hadamard import MergeHadamard
from lrcompile.passes.pipeline import Pipeline

hadamard = torch.ops.lrcompile.hadamard
IN, OUT, RANK = 5, 7, 3
X = torch.randn(4, 6, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self, body: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = body
        shapes = {"W": (OUT, IN), "V": (IN, OUT), "b": (OUT,), "A": (RANK, IN), "B": (OUT, RANK)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(*shape, dtype=torch.float64)))
        self.register_buffer("scale", torch.tensor(0.7), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)

    def adapted(self, y: Tensor, x: Tensor, W: Tensor, dropout: float = 0.0) -> Tensor:
        return hadamard(y, x, self.A, self.B, self.scale, W, dropout)


def program(body: Any) -> Program:
    net = Net(body)
    return Program(capture(net, (X,), ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)).program, net)


def ran(each: Pass, made: Program) -> Result:
    (step,) = Pipeline((each,)).run(made, Check((X,)))
    assert not each.apply(made).modified, "the pass is not idempotent"
    return step.result


def counts(made: Program) -> Counter[str]:
    return Counter(str(n.target).split(".")[1] for n in made.exported.graph.nodes if n.op == "call_function")


def linear(net: Any, x: Tensor) -> Tensor:
    return net.adapted(F.linear(x, net.W, net.b), x, net.W)


def conv(net: Any, x: Tensor) -> Tensor:
    y = torch.addmm(net.b, x.view(-1, IN), net.V).view(*x.shape[:-1], OUT)
    return net.adapted(y, x, net.V.t())


@pytest.mark.parametrize(("body", "weight"), [(linear, "W"), (conv, "V")], ids=["linear", "conv1d"])
def test_it_folds_into_the_weight(body, weight):
    made = program(body)
    assert ran(MergeHadamard(), made).count == 1
    assert list(made.pending) == [weight]
    assert not counts(made)["hadamard"]
    assert counts(made)["linear"] + counts(made)["addmm"] == 1


def test_a_stack_multiplies_the_base_each_time_and_other_uses_keep_it():
    made = program(lambda net, x: net.adapted(linear(net, x), x, net.W) * F.linear(x, net.W))
    assert ran(MergeHadamard(), made).count == 2
    assert "W" not in made.pending


KEPT: dict[str, Any] = {
    "not the one of the product it adds to": lambda net, x: net.adapted(F.linear(x, net.W), x, net.V.t()),
    "its dropout is active": lambda net, x: net.adapted(F.linear(x, net.W), x, net.W, 0.5),
    "reads another input": lambda net, x: net.adapted(F.linear(x, net.W), x.sin(), net.W),
    "used a second time": lambda net, x: (lambda y: net.adapted(y, x, net.W) + y)(F.linear(x, net.W)),
}


@pytest.mark.parametrize("reason", KEPT)
def test_what_cannot_be_folded_says_why(reason):
    made = program(KEPT[reason])
    result = MergeHadamard().apply(made)
    assert [reason in refusal.reason for refusal in result.refusals] == [True]
    assert not result.modified
    assert not made.pending


@pytest.mark.parametrize("body", [linear, conv], ids=["linear", "conv1d"])
def test_inline_it_is_one_product_with_a_held_matrix(body):
    made = program(body)
    assert ran(ExpandHadamard(), made).count == 1
    names = counts(made)
    assert not names["hadamard"] + names["mul"]
    assert names["linear"] + names["addmm"] == 2
    assert names["add"] == 1


def test_active_dropout_is_left_to_the_ops_own_decomposition():
    made = program(lambda net, x: net.adapted(F.linear(x, net.W), x, net.W, 0.5))
    assert not ExpandHadamard().apply(made).modified
    assert not any("lrcompile" in str(n.target) for n in made.exported.run_decompositions().graph.nodes)


def test_the_passes_of_pairs_serve_it_too():
    made = program(linear)
    assert ran(FoldScale(), made).count == 1
    assert ran(ExpandHadamard(), made).count == 1

    def untrained(net: Any, x: Tensor) -> Tensor:
        return hadamard(F.linear(x, net.W), x, net.A, torch.zeros_like(net.B), net.scale, net.W, 0.0)

    made = program(untrained)
    assert ran(DropZeroAdapters(), made).count == 1
    assert counts(made) == {"linear": 1}
