"""DoRA: y = b + (m/n) ⊙ x(W + s·BA)ᵀ, n the detached row norms, factored and computed once for each state."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import lrcompile
from lrcompile.dialect.norm import product_of, squared_rows

IN, OUT, RANK = 7, 9, 3
KINDS = ("linear", "no bias", "conv1d", "nf4", "nf4 conv1d")


def layer(kind="linear", inside=IN, out=OUT, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    made = Conv1D(out, inside) if "conv1d" in kind else nn.Linear(inside, out, bias=kind != "no bias")
    if made.bias is not None:
        nn.init.normal_(made.bias)
    model = nn.Sequential(made.to(dtype))
    return lrcompile.quantize(model, "nf4", block_size=32) if "nf4" in kind else model


def adapted(model: Any, trained=True, name="default", **fields) -> Any:
    fields = {"rank": RANK, "alpha": 5, "seed": 1} | fields
    lrcompile.apply(model, lrcompile.spec("dora", **fields), name=name)
    if trained:
        torch.manual_seed(2)
        with torch.no_grad():
            for key, p in model.named_parameters():
                if f".{name}." in key:
                    p.add_(torch.randn_like(p) * 0.3)
    return model


def adapter(model: Any, name="default") -> Any:
    return model[0].lrcompile_adapters["weight"][name]


def matrix(model: Any) -> Tensor:
    """W as [out, in] in float64."""
    weight = model[0].weight.detach().double()
    return weight.T if isinstance(model[0], Conv1D) else weight


def direct(model: Any, detach=True, c: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """V', its row norms and the effective weight, by the paper's formula, differentiable."""
    own = adapter(model)
    V = c * (matrix(model) + float(own.scale) * own.B.double() @ own.A.double())
    n = V.norm(dim=1)
    return V, n, (own.m.double() / (n.detach() if detach else n))[:, None] * V


def inputs(inside=IN, rows=5, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, inside, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_as_the_base_to_the_bit(kind, dtype):
    model, x = layer(kind, dtype=dtype), inputs(dtype=dtype)
    y = model(x)
    adapted(model, trained=False, dropout=0.5)
    assert torch.equal(model.train()(x), y)
    assert torch.equal(model.eval()(x), y)
    own = adapter(model)
    wide = torch.promote_types(dtype, torch.float32)
    assert own.m.dtype == wide
    torch.testing.assert_close(own.m.double(), matrix(model).norm(dim=1), rtol=8 * torch.finfo(dtype).eps, atol=0)
    if "nf4" not in kind:
        report = lrcompile.merge(model)
        assert [(row.relative_size, row.adapter_relative_error) for row in report.sites] == [(0, 0)]
        assert torch.equal(model(x), y)


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_the_papers_map(kind):
    model, x = adapted(layer(kind)), inputs()
    _, _, effective = direct(model)
    torch.testing.assert_close(model(x), F.linear(x, effective, model[0].bias), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
def test_merged_equals_unmerged_and_rows_of_the_merged_weight_are_as_long_as_m(kind):
    model, x = adapted(layer(kind)), inputs()
    with torch.no_grad():
        adapter(model).m[2] *= -1  # training may carry it there
    y, before = model(x), {key: value.clone() for key, value in model.state_dict().items()}
    lrcompile.merge(model)
    torch.testing.assert_close(model(x), y, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(matrix(model).norm(dim=1), adapter(model).m.abs(), rtol=1e-14, atol=0)
    if model[0].bias is not None:
        assert torch.equal(model[0].bias, before["0.bias"])
    lrcompile.unmerge(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    torch.testing.assert_close(model(x), y, rtol=0, atol=0)


def test_the_length_of_a_direction_does_not_matter():
    model, x = adapted(layer()), inputs()
    y, own = model(x), adapter(model)
    with torch.no_grad():
        model[0].weight.mul_(3.0)
        own.B.mul_(3.0)
    torch.testing.assert_close(model(x), y, rtol=1e-13, atol=1e-13)


def test_gradients_are_those_of_a_norm_that_is_a_constant_and_differ_from_the_others_by_the_stated_term():
    model, x = adapted(layer()), inputs()
    own, upstream = adapter(model), torch.randn(5, OUT, dtype=torch.float64)
    (model(x) * upstream).sum().backward()
    got = {key: own.get_parameter(key).grad.clone() for key in "ABm"}
    s, G = float(own.scale), upstream.T @ x
    V, n, _ = direct(model)
    along = (G * V).sum(1) / n
    dV = (own.m / n)[:, None] * G
    torch.testing.assert_close(got["A"], s * own.B.T @ dV, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got["B"], s * dV @ own.A.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got["m"], along, rtol=1e-12, atol=1e-12)

    model.zero_grad()
    _, _, effective = direct(model, detach=False)
    (F.linear(x, effective, model[0].bias) * upstream).sum().backward()
    less = (own.m / n * along / n)[:, None] * V
    torch.testing.assert_close(own.A.grad, got["A"] - s * own.B.T @ less, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(own.B.grad, got["B"] - s * less @ own.A.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(own.m.grad, got["m"], rtol=1e-12, atol=1e-12)
    assert (own.A.grad - got["A"]).abs().max() > 1e-3


@settings(deadline=None, max_examples=25, derandomize=True)
@given(inside=st.integers(2, 12), out=st.integers(2, 12), rank=st.integers(1, 6), seed=st.integers(0, 2**16))
def test_the_factored_norm_is_the_direct_one(inside, out, rank, seed):
    torch.manual_seed(seed)
    model: Any = nn.Sequential(nn.Linear(inside, out).double())
    spec = lrcompile.spec("dora", rank=rank, alpha=rank * 0.7, rank_pattern={"0": rank})
    own = adapter(lrcompile.apply(model, spec))
    with torch.no_grad():
        own.A.normal_()
        own.B.normal_()
    _, n, _ = direct(model)
    # n² is a sum of three terms that may cancel: its error is that of the largest
    size = matrix(model).norm(dim=1) + (own.scale * own.B @ own.A).norm(dim=1)
    got = (own.m / own.gain(model[0])).detach()
    assert bool(((got**2 - n**2).abs() <= 64 * torch.finfo(torch.float64).eps * size**2).all())


def test_the_norm_of_a_bfloat16_weight_is_formed_in_float32():
    model = adapted(layer(inside=300, out=50, dtype=torch.bfloat16))
    own, (_, n, _) = adapter(model), direct(model)
    norms = (own.m / own.gain(model[0])).detach()
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms.double(), n, rtol=300**0.5 * 2**-24 * 8, atol=0)


def test_a_wide_weight_is_read_a_few_rows_at_a_time(monkeypatch):
    W, x = torch.randn(11, 6, dtype=torch.bfloat16), torch.randn(3, 6)
    whole = squared_rows(W, torch.float32), product_of(x, W, torch.float32)
    monkeypatch.setattr("lrcompile.dialect.norm.BLOCK", 20)
    assert torch.equal(squared_rows(W, torch.float32), whole[0])
    torch.testing.assert_close(product_of(x, W, torch.float32), whole[1])


def test_m_is_taken_after_a_start_that_is_not_zero():
    model = layer()
    lrcompile.apply(model, lrcompile.spec("dora", rank=4, init="orthogonal"))
    own = adapter(model)
    assert own.B.any()
    _, n, _ = direct(model)
    torch.testing.assert_close(own.m.detach(), n, rtol=1e-14, atol=0)
    assert torch.equal(own.gain(model[0]), torch.ones(OUT, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_active_dropout_takes_one_mask_for_both_and_leaves_the_bias_alone(kind):
    model, x = adapted(layer(kind), dropout=0.4), inputs()
    own, (V, n, _) = adapter(model), direct(model)
    torch.manual_seed(5)
    y = model(x)
    torch.manual_seed(5)
    dropped, g = F.dropout(x, 0.4, True), own.m / n
    bias = 0 if model[0].bias is None else model[0].bias
    W, update = matrix(model), V - matrix(model)
    expected = x @ W.T + bias + (g - 1) * (dropped @ W.T) + g * (dropped @ update.T)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def test_trained_biases_get_the_gradient_of_a_bias():
    model, x = adapted(layer(), bias="all"), inputs()
    model(x).sum().backward()
    torch.testing.assert_close(model[0].bias.grad, torch.full((OUT,), 5.0, dtype=torch.float64))


def test_on_nf4_the_gradients_are_those_of_the_dequantized_weight():
    quantized, x = adapted(layer("nf4")), inputs()
    plain: Any = layer()
    with torch.no_grad():
        plain[0].weight.copy_(quantized[0].weight)
    adapted(plain)
    adapter(plain).load_state_dict(adapter(quantized).state_dict())
    for model in (plain, quantized):
        model(x).square().sum().backward()
    for key in "ABm":
        one, other = (adapter(model).get_parameter(key).grad for model in (plain, quantized))
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


class Counted(TorchDispatchMode):
    """How often an operation ran, and the largest new storage one made."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        self.counts[name] = self.counts.get(name, 0) + 1
        if isinstance(out, Tensor) and not func.is_view:
            self.largest = max(self.largest, out.untyped_storage().nbytes() // out.element_size())
        return out


@contextmanager
def computed(norms: int, squares: int = 0) -> Iterator[None]:
    """Within, n is computed `norms` times and ‖W_i‖ `squares` times."""
    with Counted() as counted:
        yield
    made = sum(counted.counts.get(f"lrcompile_kernels::{op}", 0) for op in ("dora_norm", "nf4_dora_norm"))
    assert (made, counted.counts.get("linalg_vector_norm", 0)) == (norms, squares)


class ThroughData(torch.optim.Optimizer):
    """Writes where no version counter sees it, as older optimizers and fused kernels do."""

    def __init__(self, params: Any, lr: float):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad, alpha=-group["lr"])


@pytest.mark.parametrize("kind", ["linear", "conv1d", "nf4"])
@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW, ThroughData])
@pytest.mark.parametrize("wired", [True, False])
def test_norms_are_computed_once_between_optimizer_steps(kind, cls, wired):
    model, x = adapted(layer(kind)), inputs()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = lrcompile.optimizer(model, cls, lr=0.01) if wired else cls(trained, lr=0.01)
    with computed(1, 1):
        for _ in range(3):  # gradient accumulation
            model(x).square().sum().backward()
    for _ in range(2):
        optimizer.step()
        with computed(1):
            y = model(x)
            y.square().sum().backward()
        _, _, effective = direct(model)
        torch.testing.assert_close(y, F.linear(x, effective, model[0].bias), rtol=1e-12, atol=1e-12)
    with torch.no_grad(), computed(0):
        model.eval()(x)


def test_norms_follow_every_change_of_what_they_are_made_of():
    model, x = adapted(layer()), inputs()
    other = copy.deepcopy(model)

    def right() -> bool:
        _, _, effective = direct(model)
        expected = F.linear(x, effective, model[0].bias.double())
        return torch.allclose(model(x.to(model[0].weight)).double(), expected, rtol=1e-5, atol=1e-5)

    assert right()
    with torch.no_grad():
        adapter(other).A.mul_(2)
    with computed(1, 1):
        model.load_state_dict(other.state_dict())
        model(x)
    lrcompile.activate(model, {"default": 0.5})
    with computed(1):
        model(x)
    assert right()
    with computed(1, 1):
        model[0].weight.data = model[0].weight.data * 2
        model(x)
    assert right()
    with computed(1):
        adapter(model).B.data = adapter(model).B.data.clone()
        model(x)
    memory = adapter(model).B.detach().numpy().copy()
    for _ in range(3):  # another tensor at the address of the one before
        adapter(model).B.data = torch.from_numpy(memory)
        assert right()
        memory *= 1.1
    model.float()
    assert right()
    with torch.no_grad():
        model.load_state_dict({key: value * 1.5 for key, value in model.state_dict().items()}, assign=True)
    assert right()


def test_a_norm_from_inference_mode_serves_training():
    model, x = adapted(layer()), inputs()
    with torch.inference_mode():
        model(x)
    with computed(0):
        model(x).sum().backward()
    assert adapter(model).m.grad is not None


def test_tensors_of_inference_mode_are_never_taken_for_unchanged():
    model = adapted(layer())
    own, x = adapter(model), inputs()
    with torch.inference_mode():
        own.A = nn.Parameter(own.A.detach() * 1, requires_grad=False)
        first = model(x)
        own.A.mul_(2)
        _, _, effective = direct(model)
        assert not torch.equal(model(x), first)
        torch.testing.assert_close(model(x), F.linear(x, effective, model[0].bias), rtol=1e-12, atol=1e-12)


def test_copies_compute_their_own_norms():
    model, x = adapted(layer()), inputs()
    y = model(x)
    twin, stored = copy.deepcopy(model), io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for each in (twin, torch.load(stored, weights_only=False)):
        with computed(1, 1):
            assert torch.equal(each(x), y)
    with torch.no_grad():
        adapter(twin).A.mul_(3)
    assert not torch.equal(twin(x), y)
    assert torch.equal(model(x), y)


def test_a_step_makes_nothing_of_the_weights_size():
    model, x = adapted(layer(inside=40, out=50)), inputs(40, rows=3)
    with Counted() as counted:
        model(x).square().sum().backward()
    assert counted.largest < 40 * 50


def test_under_autocast_norms_keep_their_digits():
    model, x = adapted(layer(dtype=torch.float32)), inputs(dtype=torch.float32)
    expected = adapter(model).gain(model[0]).clone()
    with torch.no_grad():
        adapter(model).A.mul_(1)  # stale
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
        got = adapter(model).gain(model[0])
    assert y.dtype == torch.bfloat16
    assert torch.equal(got, expected)


def test_beside_other_adapters_the_gain_takes_all_that_came_before_it():
    model, x = adapted(layer()), inputs()
    lrcompile.apply(model, lrcompile.spec("lora", rank=2), name="pair")
    lrcompile.apply(model, lrcompile.spec("ia3"), name="gains")
    with torch.no_grad():
        for name in ("pair", "gains"):
            for p in adapter(model, name).parameters():
                p.add_(torch.randn_like(p) * 0.3)
    for order in (["default", "pair"], ["pair", "default"], ["gains", "default"], ["default", "gains", "pair"]):
        lrcompile.activate(model, order)
        y = model(x)
        lrcompile.merge(model)
        torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)
        lrcompile.unmerge(model)


def test_gradient_checkpointing_and_per_sample_gradients_agree():
    model, x = adapted(layer()), inputs()
    model(x).square().sum().backward()
    expected = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    checkpoint(model, x.clone().requires_grad_(), use_reentrant=False).square().sum().backward()
    tensors = {key: p.detach() for key, p in model.named_parameters()}

    def loss(tensors: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(model, tensors, (row,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(tensors, x)
    for key, grad in expected.items():
        assert torch.equal(model.get_parameter(key).grad, grad)
        torch.testing.assert_close(each[key].sum(0), grad, rtol=1e-12, atol=1e-12)


def test_peft_computes_the_same_values_and_gradients():
    peft = pytest.importorskip("peft")
    x = inputs()
    theirs: Any = nn.Sequential()
    theirs.add_module("fc", layer()[0])
    config = peft.LoraConfig(r=RANK, lora_alpha=6, target_modules=["fc"], use_dora=True)
    theirs = peft.get_peft_model(theirs, config, autocast_adapter_dtype=False)
    model = adapted(layer(), alpha=6)
    own, held = adapter(model), theirs.base_model.model.fc
    with torch.no_grad():
        held.lora_A["default"].weight.copy_(own.A)
        held.lora_B["default"].weight.copy_(own.B)
        held.lora_magnitude_vector["default"].weight.copy_(own.m)
    for each in (model, theirs):
        each(x).square().sum().backward()
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-12, atol=1e-12)
    grads = (held.lora_A["default"].weight, held.lora_B["default"].weight, held.lora_magnitude_vector["default"].weight)
    for key, other in zip("ABm", grads, strict=True):
        torch.testing.assert_close(own.get_parameter(key).grad, other.grad, rtol=1e-12, atol=1e-12)
    theirs.merge_adapter()
    lrcompile.merge(model)
    torch.testing.assert_close(model[0].weight, held.base_layer.weight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["conv1d", "nf4"])
def test_compiled_it_computes_and_trains_alike(kind):
    model, x = adapted(layer(kind)), inputs()
    y = model(x)
    y.square().sum().backward()
    grads = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), y, rtol=1e-12, atol=1e-12)
    compiled(x).square().sum().backward()
    for key, p in model.named_parameters():
        if key in grads:
            torch.testing.assert_close(p.grad, grads[key], rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        adapter(model).A.mul_(2)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_inductor_computes_and_trains_alike():
    model, x = adapted(layer(inside=33, out=21, dtype=torch.float32)), inputs(33, dtype=torch.float32)
    y = model(x)
    y.square().sum().backward()
    expected = adapter(model).m.grad.clone()
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model)
    torch.testing.assert_close(compiled(x), y, rtol=1e-4, atol=1e-5)
    compiled(x).square().sum().backward()
    torch.testing.assert_close(adapter(model).m.grad, expected, rtol=1e-4, atol=1e-4)


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
    norms = {"Sqrt", "ReduceL2", "ReduceSum", "Div"}
    assert not norms & set(operations)
    if form == "merge":
        assert set(operations) <= {"Gemm", "MatMul", "Add", "Tanh", "Reshape"}
        assert operations.count("Gemm") + operations.count("MatMul") == 2


def test_an_adapter_of_the_weight_does_not_stay_beside_another_weight():
    model = adapted(nn.Sequential(nn.Linear(64, 32)))
    with pytest.raises(lrcompile.ExportError, match=r"at 0 is a function of the weight.*adapters='merge'"):
        lrcompile.export(model, "never.onnx", (torch.randn(2, 64),), quantize="nf4")


def test_it_is_refused_where_there_is_no_layer_to_read():
    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.W = nn.Parameter(torch.randn(OUT, IN))
            self.fc, self.emb = nn.Linear(OUT, 4), nn.Embedding(5, IN)

        def forward(self, ids: Tensor) -> Tensor:
            return self.fc(self.emb(ids) @ self.W.t())

    model = lrcompile.apply(Raw(), lrcompile.spec("dora", rank=2))
    rows = {row.name: row for row in lrcompile.report(model).sites}
    assert rows["fc"].adapted
    assert "acts on linear layers" in rows["W"].reason
    with pytest.raises(lrcompile.TargetError, match="linear layers, not on embeddings"):
        lrcompile.apply(Raw(), lrcompile.spec("dora", rank=2, targets=["emb"]))


def test_the_plan_counts_m():
    from lrcompile.planning import plan

    assert plan(layer(), lrcompile.spec("dora", rank=RANK)).trainable == RANK * (IN + OUT) + OUT
