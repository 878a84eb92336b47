"""LoRA's invariants on nn.Linear and Conv1D, each by name, in every dtype and shape."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import lrcompile

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def linear(inside: int, out: int, *, conv1d=False, bias=True, dtype=torch.float32) -> Any:
    if conv1d:
        module = Conv1D(out, inside)
        nn.init.normal_(module.bias)
        return module.to(dtype)
    return nn.Linear(inside, out, bias=bias, dtype=dtype)


def adapted(module: Any, **fields):
    """`module` as a model of one site, and its adapter with B ≠ 0."""
    model: Any = nn.Sequential(module)
    lrcompile.apply(model, lrcompile.spec("lora", **{"rank": 3, "alpha": 4.5, "seed": 0} | fields))
    adapter = model[0].lrcompile_adapters["weight"]["default"]
    with torch.no_grad():
        adapter.B.copy_(torch.randn(adapter.B.shape, generator=torch.Generator().manual_seed(1)))
    return model, adapter


def weight(module: Any) -> torch.Tensor:
    """`[out, in]`"""
    return module.weight.T if isinstance(module, Conv1D) else module.weight


KINDS = pytest.mark.parametrize("conv1d", [False, True], ids=["Linear", "Conv1D"])


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    lead=st.lists(st.integers(0, 3), max_size=3).map(tuple),
    inside=st.integers(2, 9),
    out=st.integers(2, 9),
    conv1d=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_at_the_start_the_output_is_the_base_to_the_bit(lead, inside, out, conv1d, bias, dtype):
    module = linear(inside, out, conv1d=conv1d and bool(lead), bias=bias, dtype=dtype)
    x = torch.randn(*lead, inside, dtype=dtype)
    y = module(x)
    lrcompile.apply(module, lrcompile.spec("lora", rank=1, alpha=7))
    assert torch.equal(module(x), y)
    assert module(x).dtype == dtype


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    lead=st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple),
    inside=st.integers(2, 9),
    out=st.integers(2, 9),
    conv1d=st.booleans(),
    scaling=st.sampled_from(["alpha/r", "alpha/sqrt(r)"]),
    dtype=st.sampled_from(DTYPES),
)
def test_the_output_is_the_formula_in_float64(lead, inside, out, conv1d, scaling, dtype):
    rank = min(inside, out, 3)
    model, adapter = adapted(linear(inside, out, conv1d=conv1d, dtype=dtype), rank=rank, scaling=scaling)
    x = torch.randn(*lead, inside).to(dtype)
    W, A, B, b = (t.detach().double() for t in (weight(model[0]), adapter.A, adapter.B, model[0].bias))
    s = 4.5 / (rank if scaling == "alpha/r" else math.sqrt(rank))
    true = x.double() @ W.T + b + s * (x.double() @ A.T) @ B.T
    size = x.double().abs() @ W.T.abs() + b.abs() + s * (x.double().abs() @ A.T.abs()) @ B.T.abs()
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps if scaling != "alpha/r" else 0)
    assert bool(((model(x).double() - true).abs() <= 10 * eps * size).all())


@KINDS
def test_the_gradients_are_s_Bt_G_and_s_G_At(conv1d):
    model, adapter = adapted(linear(7, 5, conv1d=conv1d, dtype=torch.float64))
    x, up = torch.randn(6, 7, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    model(x).backward(up)
    G = up.T @ x
    torch.testing.assert_close(adapter.A.grad, 1.5 * adapter.B.T @ G)
    torch.testing.assert_close(adapter.B.grad, 1.5 * G @ adapter.A.T)


@KINDS
def test_at_the_start_the_gradient_of_A_is_exactly_zero_and_that_of_B_is_not(conv1d):
    model, adapter = adapted(linear(7, 5, conv1d=conv1d))
    nn.init.zeros_(adapter.B)
    model(torch.randn(6, 7)).square().sum().backward()
    assert not adapter.A.grad.any()
    assert adapter.B.grad.count_nonzero() == adapter.B.numel()
    assert model[0].weight.grad is None


@KINDS
def test_the_rank_of_the_update_is_at_most_r(conv1d):
    model, _ = adapted(linear(11, 9, conv1d=conv1d, dtype=torch.float64), rank=2)
    before = weight(model[0]).detach().clone()
    lrcompile.merge(model)
    assert torch.linalg.matrix_rank(weight(model[0]).detach() - before) == 2


def test_the_trainable_numbers_are_r_times_in_plus_out():
    model, _ = adapted(linear(11, 9), rank=4)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 4 * (11 + 9)


@KINDS
def test_the_gradient_of_the_input_is_that_of_the_merged_weight(conv1d):
    model, _ = adapted(linear(7, 5, conv1d=conv1d, dtype=torch.float64))
    x, up = torch.randn(6, 7, dtype=torch.float64, requires_grad=True), torch.randn(6, 5, dtype=torch.float64)
    (g,) = torch.autograd.grad(model(x), x, up)
    lrcompile.merge(model)
    torch.testing.assert_close(g, torch.autograd.grad(model(x), x, up)[0])


def test_doubling_alpha_doubles_the_update():
    x = torch.randn(4, 7)
    for alpha in (3.0, 6.0):
        model, adapter = adapted(linear(7, 5), alpha=alpha)
        if alpha == 3.0:
            once = adapter.delta()
        assert adapter.scale.item() == alpha / 3
    assert torch.equal(adapter.delta(), 2 * once)
    assert model(x).shape == (4, 5)


def test_root_scaling_is_exact():
    _, adapter = adapted(linear(9, 8), rank=7, alpha=5, scaling="alpha/sqrt(r)")
    assert adapter.scale_value == 5 / math.sqrt(7)
    assert adapter.scale.item() == torch.tensor(5 / math.sqrt(7), dtype=torch.float32).item()


def test_peft_gives_the_same_outputs_and_gradients_from_the_same_tensors():
    peft = pytest.importorskip("peft")
    base: Any = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5)).double()
    config = peft.LoraConfig(r=3, lora_alpha=4, target_modules=["0", "2"], use_rslora=True)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    ours: Any = lrcompile.apply(
        base, lrcompile.spec("lora", rank=3, alpha=4, targets=["0", "2"], scaling="alpha/sqrt(r)")
    )
    pairs = []
    for index in ("0", "2"):
        adapter = ours.get_submodule(f"{index}.lrcompile_adapters.weight.default")
        layer = theirs.base_model.model.get_submodule(index)
        pairs += [(adapter.A, layer.lora_A["default"].weight), (adapter.B, layer.lora_B["default"].weight)]
    with torch.no_grad():
        for mine, other in pairs:
            mine.copy_(other.normal_())
    x = torch.randn(4, 7, dtype=torch.float64)
    close: Any = {"rtol": 1e-5, "atol": 1e-4}  # PEFT forms the product in float32, and gradients here reach 100
    torch.testing.assert_close(ours(x), theirs(x), **close)
    for model in (ours, theirs):
        model(x).square().sum().backward()
    for mine, other in pairs:
        torch.testing.assert_close(mine.grad, other.grad, check_dtype=False, **close)


def test_the_call_of_a_quantized_map_is_that_of_the_original():
    model: Any = nn.Sequential(nn.Linear(64, 32))
    lrcompile.quantize(model, "nf4")
    x = torch.randn(2, 64)
    assert torch.equal(model[0](input=x), model(x))


@pytest.mark.parametrize("call", [lambda m, x: m(x), lambda m, x: m(input=x)])
def test_the_call_is_that_of_the_original(call):
    model, _ = adapted(linear(7, 5))
    x = torch.randn(2, 7)
    assert torch.equal(call(model[0], x), model(x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    model, adapter = adapted(linear(7, 5), dropout=0.3)
    x = torch.randn(6, 7, requires_grad=True)
    gradients = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        torch.manual_seed(3)
        model.zero_grad()
        run(x).square().sum().backward()
        gradients.append((adapter.A.grad, adapter.B.grad))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_autocast_computes_in_its_dtype_with_float32_factors():
    model, adapter = adapted(linear(7, 5))
    x = torch.randn(6, 7)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert adapter.A.grad.dtype == torch.float32
    A, B = adapter.A.abs(), adapter.B.abs()
    base = x.abs() @ model[0].weight.abs().T + model[0].bias.abs()
    magnitude = base + float(adapter.scale) * (x.abs() @ A.T) @ B.T
    # at most six roundings to bfloat16 lie on a path: x, A, code, scaled code, B, sum (u = 2⁻⁸ each)
    assert ((y.float() - model(x)).abs() <= 6 * 2**-8 * magnitude).all()


def test_float32_factors_train_beside_a_bfloat16_base():
    model, adapter = adapted(linear(7, 5, dtype=torch.bfloat16))
    assert adapter.A.dtype == torch.float32
    model(torch.randn(3, 7, dtype=torch.bfloat16)).float().sum().backward()
    assert adapter.A.grad.dtype == torch.float32


class Counting:
    """A Dynamo backend that counts what it compiles."""

    def __init__(self) -> None:
        self.graphs: list = []

    def __call__(self, graph, example_inputs):
        self.graphs.append(graph)
        return graph


def test_compiling_breaks_no_graph_and_changed_values_recompile_nothing():
    torch._dynamo.reset()
    model: Any = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5))
    lrcompile.apply(model, lrcompile.spec("lora", rank=2), name="a")
    lrcompile.apply(model, lrcompile.spec("lora", rank=2), name="b")
    for p in model.parameters():
        nn.init.normal_(p)
    counting, x = Counting(), torch.randn(3, 7)
    step = torch.compile(model, backend=counting, fullgraph=True)

    def same() -> None:
        torch.testing.assert_close(step(x), model(x))

    lrcompile.activate(model, {"a": 1.0})
    same()
    with torch.no_grad():
        model[0].lrcompile_adapters["weight"]["a"].A.mul_(2)
    same()
    lrcompile.activate(model, {"a": 0.25})
    same()
    assert len(counting.graphs) == 1
    with lrcompile.disabled(model):
        same()
    assert len(counting.graphs) == 2
    lrcompile.activate(model, {"a": 1.0, "b": 0.5})
    same()
    assert len(counting.graphs) == 3
    for _ in range(2):
        with lrcompile.disabled(model):
            same()
        lrcompile.activate(model, {"a": 1.0})
        same()
        lrcompile.activate(model, {"b": 1.0, "a": 0.5})
        lrcompile.activate(model, {"a": 1.0, "b": 0.5})
        same()
    assert len(counting.graphs) == 3


def test_a_subclass_that_keeps_the_forward_is_a_linear_map():
    class Mine(nn.Linear):
        pass

    model, _ = adapted(Mine(7, 5))
    assert isinstance(model[0], Mine)
    assert lrcompile.report(model).sites[0].kind == "linear"


def refusals():
    def normed():
        return nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))

    def old_normed():
        with pytest.warns(FutureWarning):
            return nn.utils.weight_norm(nn.Linear(4, 3))

    def patched():
        module: Any = nn.Linear(4, 3)
        module.forward = lambda x: x
        return module

    def integers():
        module: Any = nn.Linear(4, 3)
        module.weight = nn.Parameter(torch.ones(3, 4, dtype=torch.int8), requires_grad=False)
        return module

    yield from [(normed, "parametrization"), (old_normed, "hook"), (lambda: nn.LazyLinear(3), "one batch")]
    yield from [(patched, "replaced on the instance"), (integers, "int8")]


@pytest.mark.parametrize(("build", "reason"), refusals(), ids=["parametrized", "hooked", "lazy", "patched", "int8"])
def test_a_weight_that_is_no_plain_tensor_is_refused_with_the_reason(build, reason):
    model: Any = nn.Sequential(nn.Linear(4, 4), build())
    with pytest.raises(lrcompile.TargetError, match=rf"(?s)1: .*{reason}"):
        lrcompile.apply(model, lrcompile.spec("lora", rank=2, targets=["0", "1"]))
    assert type(model[0]) is nn.Linear
