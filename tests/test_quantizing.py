"""`quantize` and `dequantize` on modules: what changes, what must not, what is spared and what is refused."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from torch import nn

import lrcompile
from lrcompile.errors import AdapterError, SpecError, TargetError
from lrcompile.hosting import Host, swap
from lrcompile.kernels.nf4_dequant import dequantize_nf4, quantize_nf4
from lrcompile.nf4.modules import attach, codes_of, detach, layout_of
from lrcompile.quantizing import Quantization, dequantize, is_nf4, nf4_weight, quantization_of, quantize
from lrcompile.sites.linear import AdaptedLinear
from lrcompile.state import State, set_state

BUFFERS = ("weight_codes", "weight_absmax", "weight_absmax_scale", "weight_absmax_offset")


class Net(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.up = nn.Linear(13, 37, dtype=dtype)
        self.inner = nn.Sequential(nn.Linear(37, 19, bias=False, dtype=dtype), nn.LayerNorm(19, dtype=dtype))
        self.down = nn.Linear(19, 5, dtype=dtype)

    def forward(self, x):
        return self.down(self.inner(torch.relu(self.up(x))))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


X = torch.randn(3, 4, 13, generator=torch.Generator().manual_seed(1))


def _done(model) -> Quantization:
    done = quantization_of(model)
    assert done is not None
    return done


def _bits(model):
    """Everything a failed call must leave alone."""
    state = {key: (id(value), value.clone()) for key, value in model.named_parameters()}
    return state, {name: type(module) for name, module in model.named_modules()}, list(model.__dict__)


def _same(before, after):
    assert before[1:] == after[1:]
    assert before[0].keys() == after[0].keys()
    for key, (identity, value) in before[0].items():
        assert after[0][key][0] == identity
        assert torch.equal(after[0][key][1].nan_to_num(), value.nan_to_num())


def _double(model):
    """The model as dense float64, its NF4 weights dequantized in float64."""
    dense = Net(torch.float64)
    dense.load_state_dict({k: v for k, v in model.state_dict().items() if "weight_" not in k}, strict=False)
    for name, module in model.named_modules():
        if is_nf4(module):
            dense.get_submodule(name).weight.data = nf4_weight(module, torch.float64)
    return dense


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_linear_map_becomes_codes_and_computes_with_them(dtype, double_quant):
    torch.manual_seed(0)
    model: Any = Net(dtype)
    expected = {
        name: quantize_nf4(model.get_submodule(name).weight, 32, double_quant) for name in ("up", "inner.0", "down")
    }
    assert lrcompile.quantize(model, "nf4", block_size=32, double_quant=double_quant) is model
    for name, nf4 in expected.items():
        module = model.get_submodule(name)
        assert isinstance(module, nn.Linear)
        assert is_nf4(module)
        assert "weight" not in dict(module.named_parameters())
        for buffer, tensor in zip(BUFFERS, nf4, strict=True):
            held = getattr(module, buffer)
            assert held is tensor if tensor is None else torch.equal(held, tensor)
    y = model(X.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(
        y.double(), _double(model)(X.to(dtype).double()), rtol=0, atol=40 * torch.finfo(dtype).eps
    )
    assert set(_done(model).quantized) == set(expected)
    assert "nf4(block_size=32" in repr(model.up)


def test_weight_reads_as_the_dequantized_weight_in_its_own_dtype(net):
    net.up.to(torch.bfloat16)
    quantize(net)
    assert net.up.weight.dtype == torch.bfloat16
    assert net.down.weight.dtype == torch.float32
    assert torch.equal(net.down.weight, dequantize_nf4(codes_of(net.down), (5, 19), 64))
    assert nf4_weight(net.up).shape == (37, 13)


def test_compute_dtype_is_where_the_product_is_formed(net):
    low = quantize(copy.deepcopy(net), compute_dtype="bfloat16")
    assert low(X).dtype == torch.float32
    error = (low(X) - quantize(net)(X)).abs().max()
    assert 2**-14 < error < 2**-4
    up: Any = quantize(Net(), compute_dtype=torch.float16).get_submodule("up")
    assert up.extra_repr().endswith("compute_dtype=torch.float16)")


def test_gradients_reach_the_bias_and_the_input_and_no_weight(net):
    quantize(net)
    x: Any = X.clone().requires_grad_()
    net(x).square().sum().backward()
    dense: Any = _double(net)
    x64: Any = X.double().requires_grad_()
    dense(x64).square().sum().backward()
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(net.up.bias.grad.double(), dense.up.bias.grad, rtol=1e-4, atol=1e-4)
    assert {name for name, _ in net.named_parameters()} == {"up.bias", "down.bias", "inner.1.weight", "inner.1.bias"}


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to(torch.bfloat16)])
def test_a_cast_changes_what_the_weight_answers_in_and_not_a_bit_of_it(net, cast):
    quantize(net)
    before = {key: value.clone() for key, value in net.state_dict().items() if ".weight_" in key}
    cast(net)
    after = net.state_dict()
    for key, value in before.items():
        assert after[key].dtype == value.dtype
        assert torch.equal(after[key], value)
    assert net.up.weight.dtype == net.up.bias.dtype == net(X.to(net.up.bias.dtype)).dtype


def test_double_gives_true_float64(net):
    quantize(net)
    dense: Any = _double(net)
    torch.testing.assert_close(net.double()(X.double()), dense(X.double()), rtol=0, atol=1e-14)


def test_the_meta_device_and_back_by_assignment(net):
    quantize(net)
    y, state = net(X), copy.deepcopy(net.state_dict())
    net.to("meta")
    assert all(tensor.is_meta for tensor in net.state_dict().values())
    assert net(X.to("meta")).shape == y.shape
    net.load_state_dict(state, assign=True)
    assert torch.equal(net(X), y)
    skeleton = quantize(Net().to("meta"))
    skeleton.load_state_dict(state, assign=True)
    assert torch.equal(skeleton(X), y)


def test_to_empty_leaves_codes_of_the_right_kind(net):
    quantize(net)
    y, state = net(X), copy.deepcopy(net.state_dict())
    net.to("meta").to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(net(X), y)


def test_the_state_dict_round_trips_and_the_wrong_storage_form_is_refused(net):
    other = quantize(Net())
    other.load_state_dict(quantize(copy.deepcopy(net)).state_dict())
    assert torch.equal(other(X), quantize(copy.deepcopy(net))(X))
    with pytest.raises(RuntimeError, match=r"weight_absmax is torch.float32, expected torch.uint8"):
        other.load_state_dict(quantize(copy.deepcopy(net), double_quant=False).state_dict())
    with pytest.raises(RuntimeError, match=r"up\.weight"):
        other.load_state_dict(net.state_dict())


class Doubled(Host):
    def forward(self, x):
        return 2 * super().forward(x)  # type: ignore[misc]


@pytest.mark.parametrize("above", [False, True])
def test_deepcopy_and_a_fresh_process_rebuild_the_generated_class(tmp_path, above):
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(13, 37), nn.ReLU(), nn.Linear(37, 5))
    quantize(model, keep_base="cpu")
    if above:
        swap(model[0], AdaptedLinear)
    clone = copy.deepcopy(model)
    assert type(clone[0]) is type(model[0])
    assert torch.equal(clone[2].weight, model[2].weight)
    assert clone[2].weight_codes is not model[2].weight_codes
    torch.save(model, tmp_path / "model.pt")
    torch.save(model[2](torch.ones(37)), tmp_path / "y.pt")
    script = f"""
        import torch
        model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
        assert torch.equal(model[2](torch.ones(37)), torch.load({str(tmp_path / "y.pt")!r}))
        from lrcompile.quantizing import is_nf4
        assert is_nf4(model[0]) and isinstance(model[0], torch.nn.Linear)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=120)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_quantized_model_compiles_whole_and_trains_alike(net, backend):
    torch._dynamo.reset()
    quantize(net)
    compiled = torch.compile(net, fullgraph=True, backend=backend)
    grads = []
    for f in (net, compiled):
        net.zero_grad()
        f(X).square().sum().backward()
        grads.append([p.grad.clone() for p in net.parameters()])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_a_quantized_model_exports_with_one_node_a_linear_map(net):
    quantize(net)
    exported = torch.export.export(net, (X,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    nodes = [n for n in exported.graph.nodes if n.target is torch.ops.lrcompile.nf4_linear.default]
    assert len(nodes) == 3
    assert torch.equal(exported.module()(X[:2]), net(X[:2]))


def test_hooks_names_and_training_flags_stay(net):
    calls = []
    net.up.register_forward_hook(lambda *_: calls.append("up"))
    net.up.bias.requires_grad_(False)
    bias = net.up.bias
    quantize(net)
    net(X)
    assert calls == ["up"]
    assert net.up.bias is bias
    assert not bias.requires_grad


def test_dequantize_returns_every_bit_where_the_base_was_kept(net):
    down = net.down
    down.weight.requires_grad_(False)
    before, y = _bits(net), net(X)
    quantize(net, keep_base="cpu")
    assert not torch.equal(net(X), y)
    assert dequantize(net) is net
    _same(before, _bits(net))
    assert torch.equal(net(X), y)
    assert not down.weight.requires_grad
    assert quantization_of(net) is None


def test_dequantize_follows_a_cast_made_since(net):
    original = net.up.weight.detach().clone()
    dequantize(quantize(net, keep_base="cpu").bfloat16())
    assert torch.equal(net.up.weight, original.bfloat16())


def test_dequantize_says_what_is_missing(net):
    with pytest.raises(AdapterError, match="no weight stored as NF4"):
        dequantize(net)
    quantize(net)
    with pytest.raises(AdapterError, match="keep_base='cpu'"):
        dequantize(net)
    assert is_nf4(net.up)


def test_attach_and_detach_work_beneath_another_generated_class(net):
    swap(net.up, Doubled)
    plain = net.up(X)
    weight = net.up.weight
    nf4 = quantize_nf4(weight, 64)
    other: Any = quantize(Net())
    attach(net.up, nf4, layout_of(other.up))
    assert [cls.__name__ for cls in type(net.up).__mro__[:2]] == ["DoubledNf4LinearLinear", "Doubled"]
    torch.testing.assert_close(net.up(X), 2 * nn.functional.linear(X, net.up.weight, net.up.bias))
    returned, _ = detach(net.up, weight)
    assert returned[0] is nf4.codes
    assert torch.equal(net.up(X), plain)


def test_the_parents_of_torch_that_read_weights_stay_right():
    torch.manual_seed(0)
    layer: Any = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True).eval()
    quantize(layer)
    assert is_nf4(layer.linear1)
    assert not is_nf4(layer.self_attn.out_proj)
    assert "MultiheadAttention" in _done(layer).spared["self_attn.out_proj"]
    x = torch.randn(2, 3, 16)
    ordinary = layer(x.clone().requires_grad_())
    with torch.no_grad():
        torch.testing.assert_close(layer(x), ordinary.detach(), rtol=1e-5, atol=1e-5)


def test_conv1d_of_transformers_is_stored_as_it_lies():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_embd=24, n_head=2, vocab_size=51, n_positions=16)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    fc = model.transformer.h[0].mlp.c_fc
    dense, x = fc.weight.detach().clone(), torch.randn(2, 3, 24)
    quantize(model)
    assert is_nf4(fc)
    assert not is_nf4(model.lm_head)
    assert "lm_head" in _done(model).spared
    assert torch.equal(fc.weight, dequantize_nf4(quantize_nf4(dense), (24, 96), 64))
    assert nf4_weight(fc).shape == (96, 24)
    torch.testing.assert_close(fc(x), x @ fc.weight + fc.bias, rtol=1e-5, atol=1e-5)
    assert "nf4" in repr(fc)
    model(torch.arange(6)[None])


class Halved(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight / 2, self.bias)


def _tied(model):
    model.inner[0] = nn.Linear(37, 37)
    model.second = nn.Linear(37, 37)
    model.second.weight = model.inner[0].weight


def _patched(model):
    model.up.forward = lambda x: x


@pytest.mark.parametrize(
    ("prepare", "name", "reason"),
    [
        (_tied, "second", r"shared: inner\.0\.weight = second\.weight"),
        (lambda m: setattr(m, "up", Halved(13, 37)), "up", "Halved has a forward of its own"),
        (lambda m: nn.utils.parametrizations.weight_norm(m.up), "up", "parametrization"),
        (lambda m: setattr(m, "attn", nn.MultiheadAttention(8, 2)), "attn.out_proj", "MultiheadAttention reads"),
        (lambda m: setattr(m, "none", nn.Linear(4, 0)), "none", "empty"),
        (_patched, "up", "replaced on the instance"),
        (lambda m: quantize(m, targets=["up"]), "up", "already"),
    ],
)
def test_what_cannot_be_stored_is_spared_by_all_linear_and_refused_by_name(net, prepare, name, reason):
    prepare(net)
    before = _bits(net)
    with pytest.raises(TargetError, match=reason):
        quantize(net, targets=[name])
    _same(before, _bits(net))
    quantize(net)
    assert name in _done(net).spared
    assert is_nf4(net.down)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named_and_the_model_left_as_it_was(net, value):
    with torch.no_grad():
        net.down.weight[1, 2] = value
    before = _bits(net)
    with pytest.raises(TargetError, match=r"down: the weight holds NaN"):
        quantize(net, keep_base="cpu")
    _same(before, _bits(net))
    quantize(net, exclude=["down"])
    assert is_nf4(net.up)
    assert not is_nf4(net.down)


def test_an_interruption_leaves_the_model_as_it_was(net, monkeypatch):
    from lrcompile import quantizing

    before, left = _bits(net), iter([quantize_nf4, quantize_nf4])

    def interrupted(*args):
        if (work := next(left, None)) is None:
            raise KeyboardInterrupt
        return work(*args)

    monkeypatch.setattr(quantizing, "quantize_nf4", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(net)
    _same(before, _bits(net))


def test_a_module_under_two_names_is_stored_once(net):
    net.alias = net.up
    quantize(net, targets=["alias", "down"])
    assert is_nf4(net.up)
    assert net.alias is net.up
    assert not is_nf4(net.inner[0])


def test_a_bare_linear_is_a_model_too():
    assert is_nf4(quantize(nn.Linear(13, 7)))


@pytest.mark.parametrize("targets", [["nowhere"], ["up", "nowhere"], r"nowhere.*", ["inner.1"]])
def test_every_target_must_hit_a_linear_map(net, targets):
    before = _bits(net)
    with pytest.raises(TargetError):
        quantize(net, targets=targets)
    _same(before, _bits(net))


def test_nothing_left_to_do_is_an_error(net):
    with pytest.raises(TargetError, match=r"no nn\.Linear"):
        quantize(nn.ReLU())
    with pytest.raises(TargetError, match="nothing is left"):
        quantize(net, exclude=".*")
    quantize(net)
    with pytest.raises(TargetError, match="already"):
        quantize(net)


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("scheme", dict(scheme="fp4")),
        ("block_size", dict(block_size=48)),
        ("block_size", dict(block_size="64")),
        ("double_quant", dict(double_quant=1)),
        ("compute_dtype", dict(compute_dtype="int8")),
        ("compute_dtype", dict(compute_dtype=torch.int32)),
        ("keep_base", dict(keep_base="disk")),
    ],
)
def test_options_out_of_range_name_the_field(net, field, options):
    with pytest.raises(SpecError, match="expected") as raised:
        quantize(net, **options)
    assert raised.value.field == field
    assert not is_nf4(net.up)


def test_wrapped_adapted_and_merged_models_are_refused_with_the_right_order(net):
    wrapped: Any = torch.compile(net)
    with pytest.raises(AdapterError, match=r"torch\.compile"):
        quantize(wrapped)
    net.up.lrcompile_adapters = nn.ModuleDict()
    with pytest.raises(TargetError, match="quantize before apply"):
        quantize(net, targets=["up"])
    del net.up.lrcompile_adapters
    state = State()
    state.merged = ("default",)
    set_state(net, state)
    with pytest.raises(lrcompile.MergeError, match="final=True"):
        quantize(net)
    assert not is_nf4(net.up)
