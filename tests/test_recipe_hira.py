"""HiRA: y = xWᵀ + b + x(W ⊙ BA)ᵀ, an update of W's rank from a low-rank pair."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lrcompile

IN, OUT, RANK = 7, 9, 3
KINDS = ("linear", "no bias", "conv1d", "nf4", "nf4 conv1d")


def layer(kind="linear", inside=IN, out=OUT, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    made = Conv1D(out, inside) if "conv1d" in kind else nn.Linear(inside, out, bias=kind != "no bias")
    if made.bias is not None:
        nn.init.normal_(made.bias)
    model = nn.Sequential(made.to(dtype))
    return lrcompile.quantize(model, "nf4", block_size=32) if "nf4" in kind else model


def adapted(model: Any, trained=True, **fields) -> Any:
    lrcompile.apply(model, lrcompile.spec("hira", **{"rank": RANK, "seed": 1} | fields))
    if trained:
        torch.manual_seed(2)
        with torch.no_grad():
            for key, p in model.named_parameters():
                if ".default." in key:
                    p.add_(torch.randn_like(p) * 0.5)
    return model


def adapter(model: Any) -> Any:
    return model[0].lrcompile_adapters["weight"]["default"]


def effective(model: Any) -> Tensor:
    weight = model[0].weight.detach()
    weight = weight.T if isinstance(model[0], Conv1D) else weight
    return weight * (1 + float(adapter(model).scale) * adapter(model).B @ adapter(model).A)


def inputs(inside=IN, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(5, inside, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_as_the_base_to_the_bit(kind, dtype):
    model, x = layer(kind, dtype=dtype), inputs(dtype=dtype)
    y = model(x)
    assert torch.equal(adapted(model, trained=False)(x), y)


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_the_formula(kind):
    model, x = adapted(layer(kind)), inputs()
    torch.testing.assert_close(model(x), F.linear(x, effective(model), model[0].bias), rtol=1e-13, atol=1e-13)
    model(x).square().sum().backward()
    got = {key: adapter(model).get_parameter(key).grad.clone() for key in "AB"}
    model.zero_grad()
    F.linear(x, effective(model), model[0].bias).square().sum().backward()
    for key, grad in got.items():
        torch.testing.assert_close(grad, adapter(model).get_parameter(key).grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
def test_merged_equals_unmerged_and_unmerge_restores_the_bits(kind):
    model, x = adapted(layer(kind)), inputs()
    y, before = model(x), {key: value.clone() for key, value in model.state_dict().items()}
    lrcompile.merge(model)
    torch.testing.assert_close(model(x), y, rtol=1e-13, atol=1e-13)
    lrcompile.unmerge(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@settings(deadline=None, max_examples=15, derandomize=True)
@given(inside=st.integers(2, 12), out=st.integers(2, 12), rank=st.integers(1, 2))
def test_the_update_has_the_weights_rank_and_not_the_pairs(inside, out, rank):
    model = adapted(layer(inside=inside, out=out), rank=rank)
    update = effective(model).detach() - model[0].weight.detach()
    assert torch.linalg.matrix_rank(update) == min(inside, out)


def test_there_is_no_alpha_and_activate_weighs_the_update():
    with pytest.raises(lrcompile.SpecError, match="hira has no alpha: W is the scale"):
        lrcompile.spec("hira", alpha=4)
    model, x = adapted(layer()), inputs()
    base, whole = model[0].weight @ x.T, model(x)
    lrcompile.activate(model, {"default": 0.5})
    expected = (whole + base.T + model[0].bias) / 2
    torch.testing.assert_close(model(x), expected, rtol=1e-13, atol=1e-13)


def test_dropout_drops_the_updates_input_only():
    model, x = adapted(layer(), dropout=0.4), inputs()
    torch.manual_seed(5)
    y = model(x)
    torch.manual_seed(5)
    update = effective(model) - model[0].weight
    expected = F.linear(x, model[0].weight, model[0].bias) + F.dropout(x, 0.4, True) @ update.T
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)


def test_peft_computes_the_same_values_gradients_and_merged_weights():
    peft = pytest.importorskip("peft")
    theirs: Any = nn.Sequential()
    theirs.add_module("fc", layer()[0])
    config = peft.HiraConfig(r=RANK, target_modules=["fc"])
    theirs = peft.get_peft_model(theirs, config, autocast_adapter_dtype=False).double()
    model, x = adapted(layer()), inputs()
    own, held = adapter(model), theirs.base_model.model.fc
    with torch.no_grad():
        held.hira_A["default"].copy_(own.A)
        held.hira_B["default"].copy_(own.B)
    for each in (model, theirs):
        each(x).square().sum().backward()
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(own.A.grad, held.hira_A["default"].grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(own.B.grad, held.hira_B["default"].grad, rtol=1e-12, atol=1e-12)
    theirs.merge_adapter()
    lrcompile.merge(model)
    torch.testing.assert_close(model[0].weight, held.base_layer.weight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["conv1d", "nf4"])
def test_compiled_it_computes_and_trains_alike(kind):
    model, x = adapted(layer(kind)), inputs()
    y = model(x)
    y.square().sum().backward()
    grads = [adapter(model).A.grad.clone(), adapter(model).B.grad.clone()]
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), y, rtol=1e-12, atol=1e-12)
    compiled(x).square().sum().backward()
    torch.testing.assert_close([adapter(model).A.grad, adapter(model).B.grad], grads, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["merge", "inline"])
@pytest.mark.parametrize("nf4", [False, True])
def test_an_export_computes_the_same_in_onnx_runtime(form, nf4, tmp_path):
    onnx = pytest.importorskip("onnx")
    model: Any = nn.Sequential(layer(dtype=torch.float32, inside=32, out=64)[0], nn.Tanh(), Conv1D(5, 64))
    model = adapted(lrcompile.quantize(model, "nf4", block_size=32) if nf4 else model)
    into = "float32" if nf4 and form == "merge" else None
    made = lrcompile.export(model, tmp_path / "m.onnx", (inputs(32, dtype=torch.float32),), adapters=form, into=into)
    assert made.verify().ok
    operations = [node.op_type for node in onnx.load(made.path).graph.node]
    if form == "merge":
        assert set(operations) <= {"Gemm", "MatMul", "Add", "Tanh", "Reshape"}
        assert operations.count("Gemm") + operations.count("MatMul") == 2
    elif not nf4:  # the element-wise product is one held matrix
        assert "Mul" not in operations
