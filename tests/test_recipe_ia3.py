"""(IA)³: y = l ⊙ (xWᵀ + b), or (x ⊙ l)Wᵀ + b in feedforward layers; merging changes the bias too."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lrcompile
from lrcompile.planning import plan

IN, OUT = 7, 9
KINDS = ("linear", "no bias", "conv1d", "nf4", "nf4 conv1d")
SIDES = ("outputs", "inputs")


def layer(kind="linear", inside=IN, out=OUT, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    made = Conv1D(out, inside) if "conv1d" in kind else nn.Linear(inside, out, bias=kind != "no bias")
    if made.bias is not None:
        nn.init.normal_(made.bias)
    model = nn.Sequential(made.to(dtype))
    return lrcompile.quantize(model, "nf4", block_size=32) if "nf4" in kind else model


def trained(model: Any, name="default") -> Any:
    torch.manual_seed(2)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if f".{name}." in key:
                p.add_(torch.randn_like(p) * 0.5)
    return model


def adapted(model: Any, side="outputs", name="default", **fields) -> Any:
    spec = lrcompile.spec("ia3", **{"feedforward": ["0"] if side == "inputs" else []} | fields)
    return lrcompile.apply(model, spec, name=name)


def gain(model: Any, name="default") -> Any:
    return model[0].lrcompile_adapters["weight"][name].gain


def formula(model: Any, x: Tensor, side: str) -> Tensor:
    weight = model[0].weight.detach()
    weight = weight.T if isinstance(model[0], Conv1D) else weight
    if side == "inputs":
        return F.linear(x * gain(model), weight, model[0].bias)
    return gain(model) * F.linear(x, weight, model[0].bias)


def inputs(inside=IN, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(5, inside, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).to(dtype)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_as_the_base_to_the_bit(kind, dtype, side):
    model, x = layer(kind, dtype=dtype), inputs(dtype=dtype)
    y = model(x)
    assert torch.equal(adapted(model, side)(x), y)
    assert gain(model).shape == (IN if side == "inputs" else OUT,)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_the_formula(kind, side):
    model, x = trained(adapted(layer(kind), side)), inputs()
    torch.testing.assert_close(model(x), formula(model, x, side), rtol=1e-13, atol=1e-13)
    model(x).square().sum().backward()
    got, gain(model).grad = gain(model).grad.clone(), None
    formula(model, x, side).square().sum().backward()
    torch.testing.assert_close(got, gain(model).grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
def test_merged_equals_unmerged_and_unmerge_restores_every_bit(kind, side):
    model, x = trained(adapted(layer(kind), side)), inputs()
    base = layer(kind)(x)
    y, before = model(x), {key: value.clone() for key, value in model.state_dict().items()}
    owned = {key: id(p) for key, p in model.named_parameters()}
    report = lrcompile.merge(model)
    changes_bias = kind != "no bias" and side == "outputs"
    assert [row.name for row in report.sites] == (["0", "0.bias"] if changes_bias else ["0"])
    torch.testing.assert_close(model(x), y, rtol=1e-13, atol=1e-13)
    with lrcompile.disabled(model):
        assert torch.equal(model(x), base)
    torch.testing.assert_close(model(x), y, rtol=1e-13, atol=1e-13)
    lrcompile.unmerge(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert {key: id(p) for key, p in model.named_parameters()} == owned


def test_a_final_merge_leaves_a_plain_layer_with_the_scaled_bias():
    model, x = trained(adapted(layer())), inputs()
    y, expected = model(x), (gain(model) * model[0].bias).detach()
    lrcompile.merge(model, final=True)
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model[0].bias, nn.Parameter(expected), rtol=1e-15, atol=0)
    torch.testing.assert_close(model(x), y, rtol=1e-13, atol=1e-13)


def test_removing_while_merged_restores_the_base():
    model = layer()
    before = copy.deepcopy(model.state_dict())
    lrcompile.merge(trained(adapted(model)))
    lrcompile.remove(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_biases_that_train_are_scaled_by_a_merge_and_kept_as_trained():
    model, x = trained(adapted(layer(), bias="all")), inputs()
    base, bias = layer()(x), model[0].bias
    with torch.no_grad():
        bias.add_(1)
    y, own = model(x), bias.detach().clone()
    lrcompile.merge(model)
    torch.testing.assert_close(bias.detach(), gain(model).detach() * own)
    state = model._lrcompile
    assert torch.equal(state.trained.value(model, "default", "0.bias"), own)  # what `save` writes
    with lrcompile.disabled(model):
        assert torch.equal(model(x), base)
    torch.testing.assert_close(model(x), y, rtol=1e-13, atol=1e-13)
    lrcompile.unmerge(model)
    assert torch.equal(bias, own)
    lrcompile.remove(model)
    assert torch.equal(model(x), base)


def test_a_bias_shared_with_another_layer_stays_there():
    model: Any = nn.Sequential(layer()[0], layer(inside=OUT)[0])
    model[1].bias = model[0].bias
    kept, x = model[0].bias.clone(), inputs()
    model = trained(lrcompile.apply(model, lrcompile.spec("ia3", targets=["0"])))
    y = model(x)
    report = lrcompile.merge(model)
    assert report.notes == ("0.bias: untied from 1.bias",)
    assert torch.equal(model[1].bias, kept)
    assert not torch.equal(model[0].bias, kept)
    torch.testing.assert_close(model(x), y, rtol=1e-13, atol=1e-13)
    lrcompile.unmerge(model)
    assert model[1].bias is model[0].bias


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_merged_bias_is_rounded_once(dtype):
    model = trained(adapted(layer(dtype=dtype)))
    bias = model[0].bias.detach().clone()
    lrcompile.merge(model)
    assert torch.equal(model[0].bias, (bias.float() + (gain(model).detach() - 1) * bias.float()).to(dtype))


def test_two_adapters_act_one_after_the_other_and_merge_alike():
    model, x = trained(adapted(layer())), inputs()
    trained(adapted(model, name="other"), "other")
    trained(adapted(model, "inputs", name="in"), "in")
    for active in (["default", "other"], ["in", "other"], {"other": 0.5, "in": -1.0, "default": 2.0}):
        lrcompile.activate(model, active)
        y = model(x)
        lrcompile.merge(model)
        torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)
        lrcompile.unmerge(model)


def test_on_nf4_a_merge_scales_the_bias_of_the_dequantized_layer():
    model, x = trained(adapted(layer("nf4", dtype=torch.float32))), inputs(dtype=torch.float32)
    y, bias = model(x), model[0].bias.detach().clone()
    lrcompile.merge(model, into="float32")
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)
    lrcompile.unmerge(model)
    assert torch.equal(model[0].bias, bias)
    assert torch.equal(model(x), y)


def test_apply_proves_it_with_example_inputs():
    model = nn.Sequential(layer()[0], nn.Tanh(), layer("conv1d", inside=OUT)[0])
    x = inputs()
    y, before = model(x), [id(p) for p in model.parameters()]
    lrcompile.apply(model, lrcompile.spec("ia3", feedforward=["2"]), example_inputs=(x,))
    assert torch.equal(model(x), y)
    lrcompile.remove(model)
    assert [id(p) for p in model.parameters()] == before


def test_a_feedforward_entry_must_name_a_site():
    with pytest.raises(lrcompile.SpecError, match="feedforward: no name ends in 'down_proj'") as caught:
        adapted(layer(), feedforward=["down_proj"])
    assert caught.value.field == "feedforward"
    with pytest.raises(lrcompile.SpecError, match="feedforward"):
        plan(layer(), lrcompile.spec("ia3", feedforward=["down_proj"]))
    with pytest.raises(lrcompile.SpecError, match="ia3 has no rank: it has one vector a site"):
        lrcompile.spec("ia3", rank=4)


def test_the_plan_counts_the_gains_of_each_side():
    model = nn.Sequential(layer()[0], layer(inside=OUT, out=4)[0])
    spec = lrcompile.spec("ia3", feedforward=["0"])
    assert [site.parameters for site in plan(model, spec).sites] == [IN, 4]
    lrcompile.apply(model, spec)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == plan(layer(), spec).trainable + 4


@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
@pytest.mark.parametrize("side", SIDES)
def test_peft_computes_the_same_values_gradients_and_merged_tensors(kind, side):
    peft = pytest.importorskip("peft")
    theirs: Any = nn.Sequential()
    theirs.add_module("fc", layer(kind)[0])
    named = ["fc"] if side == "inputs" else []
    config = peft.IA3Config(target_modules=["fc"], feedforward_modules=named, fan_in_fan_out=kind == "conv1d")
    theirs = peft.get_peft_model(theirs, config, autocast_adapter_dtype=False).double()
    model, x = trained(adapted(layer(kind), side)), inputs()
    held = theirs.base_model.model.fc
    with torch.no_grad():
        held.ia3_l["default"].copy_(gain(model).view_as(held.ia3_l["default"]))
    for each in (model, theirs):
        each(x).square().sum().backward()
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gain(model).grad, held.ia3_l["default"].grad.flatten(), rtol=1e-12, atol=1e-12)
    theirs.merge_adapter()
    lrcompile.merge(model)
    torch.testing.assert_close(model[0].weight, held.base_layer.weight, rtol=1e-12, atol=1e-12)
    if kind != "no bias":
        torch.testing.assert_close(model[0].bias, held.base_layer.bias, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", ["conv1d", "nf4"])
def test_compiled_it_computes_and_trains_alike(kind, side):
    model, x = trained(adapted(layer(kind), side)), inputs()
    y = model(x)
    y.square().sum().backward()
    grad, gain(model).grad = gain(model).grad.clone(), None
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), y, rtol=1e-12, atol=1e-12)
    compiled(x).square().sum().backward()
    torch.testing.assert_close(gain(model).grad, grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["merge", "inline"])
@pytest.mark.parametrize("nf4", [False, True])
def test_an_export_computes_the_same_in_onnx_runtime(form, nf4, tmp_path):
    onnx = pytest.importorskip("onnx")
    model: Any = nn.Sequential(layer(dtype=torch.float32, inside=32, out=64)[0], nn.Tanh(), Conv1D(5, 64))
    model = lrcompile.quantize(model, "nf4", block_size=32) if nf4 else model
    model = trained(lrcompile.apply(model, lrcompile.spec("ia3", feedforward=["2"])))
    into = "float32" if nf4 and form == "merge" else None
    made = lrcompile.export(model, tmp_path / "m.onnx", (inputs(32, dtype=torch.float32),), adapters=form, into=into)
    assert made.verify().ok
    operations = [node.op_type for node in onnx.load(made.path).graph.node]
    if form == "merge":
        assert set(operations) <= {"Gemm", "MatMul", "Add", "Tanh", "Reshape"}
    assert operations.count("Gemm") + operations.count("MatMul") + operations.count("MatMulBnb4") == 2
