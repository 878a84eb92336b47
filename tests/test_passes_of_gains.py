"""Gains in a captured program: held, dropped, folded into rows, columns and biases, fused, spelled out."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim

import lrcompile
from lrcompile.deployment.capture import capture
from lrcompile.dialect import gain as registers  # noqa: F401
from lrcompile.passes.base import Pass, Program, Result
from lrcompile.passes.checking import Check
from lrcompile.passes.deploy import deploy
from lrcompile.passes.drop_unit_gains import DropUnitGains
from lrcompile.passes.expand_gains import ExpandGains
from lrcompile.passes.fold_gains import FoldGains
from lrcompile.passes.fuse_input_gains import FuseInputGains
from lrcompile.passes.merge_adapters import MergeAdapters
from lrcompile.passes.merge_gains import MergeGains
from lrcompile.passes.merge_input_gains import MergeInputGains
from lrcompile.passes.nodes import GAIN, GAINS, INPUT_GAIN
from lrcompile.passes.pipeline import Pipeline

gain, input_gain, lora = (getattr(torch.ops.lrcompile, name) for name in ("gain", "input_gain", "lora"))
IN, OUT = 5, 7
X = torch.randn(4, 6, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """A weight, a bias and gains; `body` says how they are used."""

    def __init__(self, body: Any, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = body
        shapes = {"W": (OUT, IN), "V": (IN, OUT), "b": (OUT,), "g": (OUT,), "h": (OUT,), "l": (IN,)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(*shape, dtype=dtype)))
        self.register_buffer("one", torch.ones(OUT, dtype=dtype))
        self.register_buffer("ones", torch.ones(IN, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def program(body: Any, x: Tensor = X, dtype: torch.dtype = torch.float64) -> Program:
    net = Net(body, dtype)
    free = ({axis: Dim.DYNAMIC for axis in range(x.dim() - 1)},)
    return Program(capture(net, (x,), free).program, net)


def ran(each: Pass, made: Program, x: Tensor = X) -> Result:
    """The pass's result; its promise is checked, and that a second run changes nothing."""
    (step,) = Pipeline((each,)).run(made, Check((x,)))
    assert not each.apply(made).modified, "the pass is not idempotent"
    return step.result


def counts(made: Program) -> Counter[str]:
    return Counter(str(n.target).split(".")[1] for n in made.exported.graph.nodes if n.op == "call_function")


def linear(net: Any, x: Tensor, bias: bool = True) -> Tensor:
    return F.linear(x, net.W, net.b if bias else None)


def doubled(net: Any, x: Tensor, g: Any = None) -> Tensor:
    return linear(net, x) + F.linear(input_gain(x, net.l if g is None else g), net.W)


# --- fold-gains


def test_a_computed_gain_becomes_one_held_tensor_however_often_the_layer_runs():
    def body(net: Any, x: Tensor) -> Tensor:
        for _ in range(2):
            n = torch.linalg.vector_norm(net.W.detach(), dim=1)
            x = x + gain(linear(net, x), net.g / n, net.b)[..., :IN]
        return x

    made = program(body)
    assert counts(made)["linalg_vector_norm"] == 2
    result = ran(FoldGains(), made)
    assert result.count == 2
    assert counts(made)["linalg_vector_norm"] == counts(made)["div"] == 0
    assert counts(made)["gain"] == 2
    assert len({node.args[1] for node in made.exported.graph.nodes if node.target is GAIN}) == 1


@pytest.mark.parametrize(
    "body",
    [
        lambda net, x: gain(linear(net, x), net.g, None),
        lambda net, x: gain(linear(net, x), x.sum((0, 1, 2)) * net.g, None),
        lambda net, x: linear(net, x),
    ],
    ids=["held already", "of an input", "no gain"],
)
def test_a_gain_that_is_held_or_depends_on_an_input_stays(body):
    made = program(body)
    code = made.exported.graph_module.code
    assert not ran(FoldGains(), made).modified
    assert made.exported.graph_module.code == code


# --- drop-unit-gains


def test_gains_of_one_cost_nothing():
    made = program(lambda net, x: gain(gain(linear(net, x), net.one, net.b), net.one, None))
    assert ran(DropUnitGains(), made).count == 2
    assert counts(made) == {"linear": 1}
    made = program(lambda net, x: doubled(net, x, net.ones))
    assert ran(DropUnitGains(), made).count == 1
    assert counts(made) == {"linear": 1}


def test_gains_other_than_one_stay():
    made = program(lambda net, x: gain(doubled(net, x), net.g, net.b))
    assert not ran(DropUnitGains(), made).modified


# --- merge-gains

MERGED: dict[str, tuple[Any, set[str]]] = {
    "a gain that keeps the bias": (lambda net, x: gain(linear(net, x), net.g, net.b), {"W"}),
    "a gain of everything": (lambda net, x: gain(linear(net, x), net.g, None), {"W", "b"}),
    "no bias": (lambda net, x: gain(linear(net, x, False), net.g, None), {"W"}),
    "matmul": (lambda net, x: gain(x @ net.V, net.g, None), {"V"}),
    "addmm": (
        lambda net, x: gain(torch.addmm(net.b, x.view(-1, IN), net.V).view(*x.shape[:-1], OUT), net.g, net.b),
        {"V"},
    ),
    "addmm, everything": (
        lambda net, x: gain(torch.addmm(net.b, x.view(-1, IN), net.V).view(*x.shape[:-1], OUT), net.g, None),
        {"V", "b"},
    ),
    "two": (lambda net, x: gain(gain(linear(net, x), net.g, None), net.h, None), {"W", "b"}),
    "a gain that keeps the bias another changed": (
        lambda net, x: gain(gain(linear(net, x), net.g, None), net.h, net.b),
        {"W", "b_adapted"},
    ),
    "used twice alike": (
        lambda net, x: gain(linear(net, x), net.g, None) * gain(linear(net, x.sin()), net.g, None),
        {"W", "b"},
    ),
}


@pytest.mark.parametrize("name", MERGED)
def test_gains_fold_into_rows_and_bias(name):
    body, pending = MERGED[name]
    made = program(body)
    result = ran(MergeGains(), made)
    assert result.modified
    assert not result.refusals
    assert not counts(made)["gain"]
    assert set(made.pending) == pending


def test_other_uses_of_weight_and_bias_keep_their_numbers():
    made = program(lambda net, x: gain(linear(net, x), net.g, None) * F.linear(x.sin(), net.W, net.b))
    assert ran(MergeGains(), made).count == 1
    assert set(made.pending) == {"W_adapted", "b_adapted"}
    made = program(lambda net, x: gain(linear(net, x), net.g, net.b) + net.b)
    assert ran(MergeGains(), made).count == 1
    assert set(made.pending) == {"W"}


KEPT: dict[str, Any] = {
    "used a second time": lambda net, x: (lambda y: gain(y, net.g, None) + y)(linear(net, x)),
    "not from a product": lambda net, x: gain(linear(net, x).tanh(), net.g, None),
    "keeps something else of its base output than the bias": lambda net, x: gain(linear(net, x), net.g, net.h),
    "its bias is computed": lambda net, x: gain(F.linear(x, net.W, net.b * 2), net.g, None),
    "its weight is computed": lambda net, x: gain(F.linear(x, net.W * 2), net.g, None),
    "gains depend on an input": lambda net, x: gain(linear(net, x), x.sum((0, 1, 2)) * net.g, None),
}


@pytest.mark.parametrize("reason", KEPT)
def test_a_gain_that_cannot_be_folded_says_why(reason):
    made = program(KEPT[reason])
    (refusal,) = ran(MergeGains(), made).refusals
    assert reason in refusal.reason
    assert not made.pending


@settings(deadline=None, max_examples=10, derandomize=True)
@given(dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), seed=st.integers(0, 2**16))
def test_rows_and_bias_are_rounded_once(dtype, seed):
    torch.manual_seed(seed)
    x = X.to(dtype)
    net: Any = Net(lambda net, x: gain(linear(net, x), net.g.float(), None), dtype)
    made = Program(capture(net, (x,)).program, net)
    Pipeline((FoldGains(), MergeGains())).run(made)
    g = net.g.detach().float()
    assert torch.equal(made.pending["W"](), (net.W.detach().float() * g[:, None]).to(dtype))
    assert torch.equal(made.pending["b"](), (net.b.detach().float() * g).to(dtype))


# --- merge-input-gains, fuse-input-gains


def conv(net: Any, x: Tensor) -> Tensor:
    y = torch.addmm(net.b, x.view(-1, IN), net.V).view(*x.shape[:-1], OUT)
    return y + F.linear(input_gain(x, net.l), net.V.t())


@pytest.mark.parametrize(("body", "weight"), [(doubled, "W"), (conv, "V")], ids=["linear", "conv1d"])
def test_gains_on_inputs_fold_into_columns(body, weight):
    made = program(body)
    assert ran(MergeInputGains(), made).count == 1
    assert list(made.pending) == [weight]
    assert not counts(made)["input_gain"]
    assert counts(made)["linear"] + counts(made)["addmm"] == 1


@pytest.mark.parametrize("body", [doubled, conv], ids=["linear", "conv1d"])
def test_gains_on_inputs_fuse_into_one_product(body):
    made = program(body)
    assert ran(FuseInputGains(), made).count == 1
    assert counts(made)["linear"] + counts(made)["addmm"] == 1
    assert counts(made)["mul"] == 1
    assert not counts(made)["input_gain"]
    assert not made.pending


APART: dict[str, Any] = {
    "not the same weight": lambda net, x: linear(net, x) + F.linear(input_gain(x, net.l), net.V.t()),
    "not added to another one": lambda net, x: F.linear(input_gain(x, net.l), net.W).relu(),
    "another input than its base": lambda net, x: linear(net, x.sin()) + F.linear(input_gain(x, net.l), net.W),
    "used a second time": lambda net, x: (lambda y: y * (y + F.linear(input_gain(x, net.l), net.W)))(linear(net, x)),
    "not the input of one product": lambda net, x: input_gain(x, net.l).sum(-1, keepdim=True) + linear(net, x),
}


@pytest.mark.parametrize("each", [MergeInputGains(), FuseInputGains()], ids=str)
@pytest.mark.parametrize("reason", APART)
def test_a_gain_on_inputs_without_its_two_products_says_why(reason, each):
    made = program(APART[reason])
    (refusal,) = ran(each, made).refusals
    assert reason in refusal.reason


def test_in_16_bits_gains_on_inputs_are_not_rounded_to_one():
    made = program(lambda net, x: doubled(net, x, net.l.float()), X.bfloat16(), torch.bfloat16)
    (refusal,) = ran(FuseInputGains(), made, X.bfloat16()).refusals
    assert "would round to one in torch.bfloat16" in refusal.reason


# --- expand-gains


@pytest.mark.parametrize(("kept", "expected"), [(True, {"sub": 1, "mul": 1, "add": 1}), (False, {"mul": 1, "add": 1})])
def test_a_held_gain_is_spelled_out(kept, expected):
    made = program(lambda net, x: gain(linear(net, x), net.g, net.b if kept else None))
    assert ran(ExpandGains(), made).count == 1
    assert counts(made) == {"linear": 1, **expected}


def test_g_less_one_keeps_its_digits_in_16_bits():
    def body(net: Any, x: Tensor) -> Tensor:
        return gain(linear(net, x), 1 + 1e-4 * net.g.float(), net.b)

    made = program(body, X.bfloat16(), torch.bfloat16)
    net: Any = made.model
    Pipeline((FoldGains(), ExpandGains())).run(made, Check((X.bfloat16(),)))
    (held,) = [tensor for name, tensor in made.exported.state_dict.items() if name.endswith("less_one")]
    torch.testing.assert_close(held.double(), net.g.double() * 1e-4, rtol=2**-7, atol=0)


def test_a_gain_that_is_computed_is_left_to_its_own_decomposition():
    made = program(lambda net, x: gain(linear(net, x), net.g * 2, net.b))
    assert not ran(ExpandGains(), made).modified
    assert not any("lrcompile" in str(n.target) for n in made.exported.run_decompositions().graph.nodes)


# --- merge-adapters


def test_a_mixed_stack_folds_from_the_product_outwards():
    def body(net: Any, x: Tensor) -> Tensor:
        s = net.one[0].float()
        y = gain(doubled(net, x), net.g, None)
        y = lora(y, x, net.W[:2], net.V[:2].t(), s, 0.0)
        return lora(gain(y, net.h, net.b), x, net.W[2:3], net.V[2:3].t(), s, 0.0)

    made = program(body)
    assert ran(MergeAdapters(), made).count == 5
    assert counts(made)["linear"] == 1
    assert not counts(made)["gain"] + counts(made)["lora"] + counts(made)["input_gain"]


def test_what_stays_is_said_for_every_kind():
    made = program(lambda net, x: gain(linear(net, x).tanh(), net.g, None))
    assert [refusal.reason.split(",")[0] for refusal in ran(MergeAdapters(), made).refusals] == [
        "its base output comes from aten.tanh.default"
    ]


def test_the_passes_run_on_what_a_model_with_adapters_gives():
    model: Any = nn.Sequential(nn.Linear(IN, OUT), nn.Tanh(), nn.Linear(OUT, 4)).double().eval()
    lrcompile.apply(model, lrcompile.spec("dora", rank=2), name="d")
    lrcompile.apply(model, lrcompile.spec("ia3", feedforward=["2"]), name="i")
    lrcompile.apply(model, lrcompile.spec("hira", rank=2), name="h")
    lrcompile.apply(model, lrcompile.spec("lora", rank=2), name="l")
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lrcompile_adapters" in key:
                p.add_(torch.randn_like(p) * 0.3)
    lrcompile.activate(model, ["h", "i", "d", "l"])
    x = X[0]
    for form in ("merge", "inline"):
        made = Program(capture(model, (x,)).program, model)
        deploy(form).run(made, Check((x,)))
        left = {n.target for n in made.exported.graph.nodes} & set(GAINS)
        if form == "merge":
            assert counts(made) == {"linear": 2, "tanh": 1}
        else:
            assert left == {INPUT_GAIN}  # above another adapter, it has no product of its own to fuse with


def test_a_merged_dora_leaves_nothing_but_its_weights():
    model: Any = lrcompile.apply(nn.Sequential(nn.Linear(IN, OUT), nn.Tanh()), lrcompile.spec("dora", rank=2))
    with torch.no_grad():
        for p in model[0].lrcompile_adapters.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    made = Program(capture(model, (torch.randn(4, IN),)).program, model)
    deploy("merge").run(made)
    assert counts(made) == {"linear": 1, "tanh": 1}
    assert list(made.pending) == ["0.weight"]
