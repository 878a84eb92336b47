"""apply(example_inputs=…) proves on the spot that each adapter acts exactly where its weight acts."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lrcompile
from lrcompile.errors import AdapterError

SPEC = lrcompile.spec("lora", rank=2, seed=0)
X = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(5, 6), nn.Linear(6, 5), nn.BatchNorm1d(6)

    def forward(self, x):
        return self.b(F.dropout(self.norm(self.a(x)), 0.2, self.training))


class ReadByParent(Plain):
    def forward(self, x):
        return super().forward(x) @ self.b.weight


class ReadFromList(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.held = [self.b.weight]

    def forward(self, x):
        return super().forward(x) @ self.held[0]


class OnlyRead(Plain):
    def forward(self, x):
        return F.linear(self.norm(self.a(x)), self.b.weight)


@pytest.mark.parametrize(
    ("build", "message"),
    [(ReadByParent, r"used past its adapter.*\n  b\n"), (ReadFromList, r"used past its adapter.*\n  b\n"),
     (OnlyRead, r"no gradient reaches 2.*b\.lrcompile")],
)  # fmt: skip
def test_a_weight_used_past_its_module_is_named_and_the_model_is_as_it_was(build, message):
    model = build()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    classes = [type(m) for m in model.modules()]
    with pytest.raises(lrcompile.TargetError, match=rf"(?s){message}") as caught:
        lrcompile.apply(model, SPEC, example_inputs=(X,))
    assert "\n  a\n" not in str(caught.value)
    assert [type(m) for m in model.modules()] == classes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert list(model.state_dict()) == list(before)


@pytest.mark.parametrize("inputs", [(X,), {"x": X}])
def test_the_proof_leaves_no_trace(inputs):
    model: Any = Plain()
    model.b.eval()
    model(X).sum().backward()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    gradients = {k: p.grad for k, p in model.named_parameters()}
    buffers = {k: id(b) for k, b in model.named_buffers()}
    modes = {k: m.training for k, m in model.named_modules()}
    states = (torch.get_rng_state(), random.getstate())
    given = X.clone()
    lrcompile.apply(model, SPEC, example_inputs=inputs)
    after = model.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    assert {k: id(b) for k, b in model.named_buffers() if "lrcompile" not in k} == buffers
    assert all(model.get_parameter(k).grad is g for k, g in gradients.items())
    assert all(p.grad is None for k, p in model.named_parameters() if "lrcompile" in k)
    assert all(model.get_submodule(k).training == mode for k, mode in modes.items())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert torch.equal(X, given)
    assert not model.a.lrcompile_adapters["weight"]["default"].B.any()
    assert [row.dead for row in lrcompile.report(model).sites if row.adapted] == [False, False]


def test_factors_after_the_proof_are_those_without_it():
    one, two = Plain(), Plain()
    lrcompile.apply(one, SPEC, example_inputs=(X,))
    lrcompile.apply(two, SPEC)
    key = "a.lrcompile_adapters.weight.default.A"
    assert torch.equal(one.get_parameter(key), two.get_parameter(key))


def test_an_unused_site_is_named():
    class Unused(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.c = nn.Linear(5, 5)

    with pytest.raises(lrcompile.TargetError, match=r"(?s)no gradient reaches 2.*c\.lrcompile"):
        lrcompile.apply(Unused(), lrcompile.spec("lora", rank=2, targets=["a", "c"]), example_inputs=(X,))


def test_a_tied_weight_is_no_bypass_as_merging_unties_it():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(11, 5), nn.Linear(5, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.embed(ids))

    model: Any = Tied()
    lrcompile.apply(model, lrcompile.spec("lora", rank=2, targets=["head"]), example_inputs=(torch.arange(7),))
    assert model.head.weight is model.embed.weight


def test_dropped_layers_are_run_until_each_was_seen():
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layerdrop, self.layers = 0.5, nn.ModuleList(nn.Linear(5, 5) for _ in range(8))

        def forward(self, x):
            for layer in self.layers:
                if not self.training or torch.rand(()) > self.layerdrop:
                    x = x + layer(x)
            return x

    lrcompile.apply(Dropping(), SPEC, example_inputs=(X,))


def test_a_captured_program_and_a_quantized_base_are_proved_too():
    program: Any = torch.export.export(nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 4)), (X,)).module()
    lrcompile.apply(program, SPEC, example_inputs=(X,))
    model: Any = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    lrcompile.apply(model, lrcompile.spec("qlora", rank=2), example_inputs=(torch.randn(2, 64),))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rounding_is_no_bypass(dtype):
    model: Any = nn.Sequential(*(nn.Linear(32, 32) for _ in range(6))).to(dtype)
    lrcompile.apply(model, SPEC, example_inputs=(torch.randn(4, 32, dtype=dtype),))


def test_a_second_adapter_is_proved_beside_the_first():
    model: Any = Plain()
    lrcompile.apply(model, SPEC, name="one", example_inputs=(X,))
    lrcompile.apply(model, SPEC, name="two", example_inputs=(X,))
    assert lrcompile.report(model).active == ("two",)


def test_inputs_the_model_does_not_take_are_one_error_and_leave_it_plain():
    model = nn.Linear(5, 7)
    with pytest.raises(AdapterError, match="Linear cannot be run on example_inputs"):
        lrcompile.apply(model, lrcompile.spec("lora", rank=2), example_inputs=(torch.ones(2, 6),))
    assert type(model) is nn.Linear
    assert all(p.requires_grad for p in model.parameters())
