"""drop-zero-adapters: y + s·(xAᵀ)0ᵀ = y; an adapter that was never trained leaves the program."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

import lrcompile
from lrcompile.deployment.capture import capture
from lrcompile.passes.base import Program
from lrcompile.passes.drop_zero_adapters import DropZeroAdapters

IN, HIDDEN, OUT, RANK = 10, 13, 7, 3


def _program(model: nn.Module, *inputs: torch.Tensor) -> Program:
    return Program(capture(model, inputs).program, model)


def _counts(program: Program) -> dict[str, int]:
    targets = Counter(str(node.target) for node in program.exported.graph.nodes if node.op == "call_function")
    return {name: targets[f"lrcompile.{name}.default"] for name in ("lora", "lora_embedding")}


def _adapted(*trained: str) -> Any:
    """An embedding and two maps, all adapted; only the factors of `trained` are not zero."""
    model: Any = nn.Sequential(nn.Embedding(11, IN), nn.Linear(IN, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, OUT))
    lrcompile.apply(model, lrcompile.spec("lora", rank=RANK, targets=["0", "1", "3"]))
    for name in trained:
        for factor in model.get_submodule(name).lrcompile_adapters["weight"]["default"].parameters():
            nn.init.normal_(factor)
    return model.eval()


IDS = torch.arange(12).view(2, 6) % 11


@pytest.mark.parametrize(
    ("trained", "expected"),
    [
        ((), {"lora": 0, "lora_embedding": 0}),
        (("1",), {"lora": 1, "lora_embedding": 0}),
        (("0",), {"lora": 0, "lora_embedding": 1}),
        (("0", "1", "3"), {"lora": 2, "lora_embedding": 1}),  # must not fire
    ],
)
def test_exactly_the_untrained_adapters_go_and_the_bits_stay(trained, expected):
    """Each dropped adapter saves 2·T·rank·(in + out) operations and both of its factors."""
    model = _adapted(*trained)
    program = _program(model, IDS)
    assert _counts(program) == {"lora": 2, "lora_embedding": 1}
    result = DropZeroAdapters().apply(program)
    assert _counts(program) == expected
    assert result.count == 3 - len(trained)
    assert result.modified == (len(trained) < 3)
    assert not DropZeroAdapters().apply(program).modified
    for ids in (IDS, IDS[:1], IDS.repeat(3, 2)):  # the batch and the length still vary
        with torch.no_grad():
            assert torch.equal(program.module()(ids), model(ids))


def test_without_adapters_nothing_happens():
    model = nn.Linear(IN, OUT)
    program = _program(model, torch.randn(4, IN))
    code = program.exported.graph_module.code
    assert not DropZeroAdapters().apply(program).modified
    assert program.exported.graph_module.code == code


def test_of_two_stacked_adapters_the_trained_one_stays():
    model: Any = nn.Sequential(nn.Linear(IN, OUT))
    for name in ("one", "two"):
        lrcompile.apply(model, lrcompile.spec("lora", rank=RANK, targets=["0"]), name=name)
    lrcompile.activate(model, {"one": 1.0, "two": 1.0})
    nn.init.normal_(model[0].lrcompile_adapters["weight"]["two"].B)
    model.eval()
    x = torch.randn(4, IN)
    program = _program(model, x)
    assert _counts(program)["lora"] == 2
    assert DropZeroAdapters().apply(program).count == 1
    (left,) = [node for node in program.exported.graph.nodes if node.name.startswith("lora")]
    assert left.args[0].target is torch.ops.aten.linear.default
    with torch.no_grad():
        assert torch.equal(program.module()(x), model(x))


@pytest.mark.parametrize("both", [False, True])
def test_an_adapter_that_is_an_output_gives_its_place_to_the_base_output(both):
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map, self.A, self.B = nn.Linear(IN, OUT), nn.Parameter(torch.randn(RANK, IN)), torch.zeros(OUT, RANK)
            self.scale = torch.tensor(2.0)

        def forward(self, x):
            y = self.map(x)
            adapted = torch.ops.lrcompile.lora(y, x, self.A, self.B, self.scale, 0.0)
            return (y, adapted) if both else {"adapted": adapted}

    model, x = Head(), torch.randn(4, IN)
    program = _program(model, x)
    assert DropZeroAdapters().apply(program).count == 1
    with torch.no_grad():
        found, expected = program.module()(x), model(x)
    keys = range(2) if both else ["adapted"]
    assert all(torch.equal(found[key], expected[key]) for key in keys)
    torch.export.export(program.module(), (x,))  # still a program torch accepts


def test_a_factor_that_depends_on_an_input_is_left_alone():
    class Fed(nn.Module):
        def forward(self, y, x, A, B):
            return torch.ops.lrcompile.lora(y, x, A, B, torch.tensor(1.0), 0.0)

    given = (torch.randn(4, OUT), torch.randn(4, IN), torch.randn(RANK, IN), torch.zeros(OUT, RANK))
    model = Fed()
    program = Program(capture(model, given, "static").program, model)
    assert not DropZeroAdapters().apply(program).modified
