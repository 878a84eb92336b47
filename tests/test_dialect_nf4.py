"""The op `nf4_linear`: the same eager, compiled, exported and under autocast; gradients that keep only the codes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lrcompile.dialect.nf4 import nf4_linear_aten
from lrcompile.kernels.nf4_dequant import dequantize_nf4, quantize_nf4
from lrcompile.kernels.nf4_dequant.storage import kept_tables

op = torch.ops.lrcompile.nf4_linear
OUT, IN, BLOCK = 7, 13, 32


def _randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _stored(transposed=False, double_quant=True, out=OUT, inp=IN, block=BLOCK):
    shape = (inp, out) if transposed else (out, inp)
    nf4 = quantize_nf4(_randn(*shape, seed=3), block, double_quant)
    return nf4, dequantize_nf4(nf4, shape, block, torch.float64)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("double_quant", [False, True])
def test_first_and_second_derivatives_are_right_in_float64(transposed, double_quant):
    nf4, _ = _stored(transposed, double_quant)
    x = _randn(2, 3, IN, dtype=torch.float64).requires_grad_()
    bias = _randn(OUT, seed=1, dtype=torch.float64).requires_grad_()

    def f(x, bias):
        return op(x, *nf4, bias, OUT, IN, BLOCK, transposed, torch.float64)

    assert torch.autograd.gradcheck(f, (x, bias))
    assert torch.autograd.gradgradcheck(lambda x, bias: f(x, bias).square(), (x, bias))


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    lead=st.lists(st.integers(0, 4), max_size=3), out=st.integers(1, 19), inp=st.integers(1, 70),
    transposed=st.booleans(), bias=st.booleans(), block=st.sampled_from([32, 64, 4096]),
)  # fmt: skip
def test_float64_in_gives_true_float64_and_its_gradients(lead, out, inp, transposed, bias, block):
    nf4, weight = _stored(transposed, True, out, inp, block)
    weight = weight.T if transposed else weight
    x, b = _randn(*lead, inp, dtype=torch.float64).requires_grad_(), _randn(out, dtype=torch.float64).requires_grad_()
    y = op(x, *nf4, b if bias else None, out, inp, block, transposed, torch.float64)
    expected = x.detach() @ weight.T + (b.detach() if bias else 0)
    seed = _randn(*y.shape, seed=2, dtype=torch.float64)
    y.backward(seed)
    bound = dict(rtol=0, atol=2**-52 * 16 * (inp + out))
    assert y.is_contiguous()
    torch.testing.assert_close(y.detach(), expected, **bound)
    torch.testing.assert_close(x.grad, seed @ weight, **bound)
    if bias:
        torch.testing.assert_close(b.grad, seed.reshape(-1, out).sum(0), **bound)
    else:
        assert b.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_the_answer_has_the_dtype_of_x_and_the_precision_of_compute_dtype(dtype, compute):
    nf4, weight = _stored()
    x, bias = _randn(5, IN, dtype=dtype).requires_grad_(), _randn(OUT, seed=1).requires_grad_()
    y = op(x, *nf4, bias, OUT, IN, BLOCK, False, compute)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    assert bias.grad.dtype == torch.float32
    magnitude = x.detach().double().abs() @ weight.abs().T + bias.detach().double().abs()
    error = (y.detach().double() - x.detach().double() @ weight.T - bias.detach().double()).abs() / magnitude
    roundoff = torch.finfo(compute).eps / 2
    assert error.max() <= 4 * roundoff + torch.finfo(dtype).eps
    if compute == torch.bfloat16 and dtype == torch.float32:
        assert error.max() > roundoff / 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [False, True])
def test_opcheck_finds_schema_fake_autograd_and_aot_in_agreement(dtype, double_quant):
    nf4, _ = _stored(double_quant=double_quant)
    x, bias = _randn(2, 3, IN, dtype=dtype).requires_grad_(), _randn(OUT).requires_grad_()
    torch.library.opcheck(op.default, (x, *nf4, bias, OUT, IN, BLOCK, False, torch.bfloat16))
    torch.library.opcheck(op.default, (x.detach(), *nf4, None, OUT, IN, BLOCK, False, torch.float32))


def test_backward_keeps_the_codes_and_nothing_else():
    out, inp = 96, 160
    nf4, _ = _stored(out=out, inp=inp)
    saved: list[torch.Tensor] = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        x = _randn(50, inp).requires_grad_()
        op(x, *nf4, _randn(out).requires_grad_(), out, inp, BLOCK, False, torch.float32)
    held = {t.untyped_storage().data_ptr(): t.nbytes for t in saved}
    assert sum(held.values()) == sum(t.nbytes for t in nf4)
    assert set(held) == {t.untyped_storage().data_ptr() for t in nf4}


def test_compiled_backward_is_handed_no_dequantized_weight():
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    out, inp = 40, 24
    nf4, _ = _stored(out=out, inp=inp)
    sizes: list[list[tuple[int, ...]]] = []

    def backward_compiler(graph, example_inputs):
        sizes.append([tuple(node.meta["val"].shape) for node in graph.graph.nodes if node.op == "placeholder"])
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=lambda g, _: make_boxed_func(g.forward), bw_compiler=backward_compiler)

    @torch.compile(backend=backend, fullgraph=True)
    def f(x):
        return op(x * 2, *nf4, None, out, inp, BLOCK, False, torch.float32)

    f(_randn(5, inp).requires_grad_()).sum().backward()
    assert len(sizes) == 1
    assert all(torch.Size(shape).numel() < out * inp for shape in sizes[0])


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(11, IN)
        for name, tensor in _stored()[0]._asdict().items():
            self.register_buffer(name, tensor)
        self.bias = nn.Parameter(_randn(OUT, seed=5))

    def forward(self, x):
        return op(
            self.first(x).relu(), self.codes, self.absmax, self.absmax_scale, self.absmax_offset, self.bias,
            OUT, IN, BLOCK, False, torch.float32,
        )  # fmt: skip


@pytest.fixture
def net():
    torch.manual_seed(0)
    torch._dynamo.reset()
    return _Net()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_and_eager_agree_with_and_without_autocast(net, backend, autocast):
    def inside(x):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return net(x)

    results = []
    for f in (inside, torch.compile(inside, fullgraph=True, backend=backend)):
        net.zero_grad()
        y = f(_randn(5, 11))
        y.float().square().sum().backward()
        results.append((y, net.first.weight.grad.clone(), net.bias.grad.clone()))
    for eager, compiled in zip(*results, strict=True):
        assert eager.dtype == compiled.dtype
        roundings = 8 * (2**-8 if autocast else 2**-24)  # the same operations, each free to round the other way
        assert (compiled - eager).abs().max() <= roundings * eager.abs().max()
    assert results[0][0].dtype == (torch.bfloat16 if autocast else torch.float32)


def test_under_autocast_the_op_does_what_a_linear_of_the_dequantized_weight_does():
    nf4, weight = _stored()
    x = _randn(5, IN)
    with torch.autocast("cpu", torch.bfloat16):
        ours = op(x, *nf4, None, OUT, IN, BLOCK, False, torch.float32)
        theirs = nn.functional.linear(x, weight.float())
    assert torch.equal(ours, theirs)


def test_autocast_leaves_float64_alone():
    nf4, weight = _stored()
    x = _randn(5, IN, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = op(x, *nf4, None, OUT, IN, BLOCK, False, torch.float64)
    torch.testing.assert_close(y, x @ weight.T, rtol=0, atol=1e-13)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_other_batch_sizes_recompile_once_at_most(net, backend):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    for batch in (5, 6, 9, 17):
        torch.testing.assert_close(compiled(_randn(batch, 11)), net(_randn(batch, 11)), rtol=1e-5, atol=1e-5)
    assert counter.frame_count <= 2


def _targets(module):
    return [node.target for node in module.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("strict", [False, True])
def test_export_keeps_one_node_and_any_batch(net, strict):
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    exported = torch.export.export(net, (_randn(4, 11),), dynamic_shapes=dynamic, strict=strict)
    for program in (exported, exported.run_decompositions()):
        assert _targets(program.graph_module).count(op.default) == 1
    assert torch.equal(exported.module()(_randn(9, 11)), net(_randn(9, 11)))


@pytest.mark.parametrize("transposed", [False, True])
def test_the_plain_form_agrees_in_value_and_gradient(transposed):
    nf4, _ = _stored(transposed)
    results = []
    forms: tuple[Any, ...] = (op, nf4_linear_aten)
    for f in forms:
        x, bias = _randn(2, 3, IN).requires_grad_(), _randn(OUT).requires_grad_()
        y = f(x, *nf4, bias, OUT, IN, BLOCK, transposed, torch.float32)
        y.square().sum().backward()
        results.append((y, x.grad, bias.grad))
    assert torch.equal(results[0][0], results[1][0])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_strides_of_x_do_not_matter_and_its_storage_is_not_returned():
    nf4, weight = _stored()
    x = _randn(IN, 3, 2).permute(2, 1, 0)
    y = op(x, *nf4, None, OUT, IN, BLOCK, False, torch.float32)
    assert y.is_contiguous()
    torch.testing.assert_close(y.double(), x.double() @ weight.T, rtol=1e-5, atol=1e-5)


def test_the_meta_device_gives_shape_and_dtype():
    nf4, _ = _stored()
    y = op(
        torch.empty(2, 3, IN, device="meta"), *(t.to("meta") for t in nf4), None, OUT, IN, BLOCK, False, torch.float32
    )
    assert (y.shape, y.is_meta) == ((2, 3, OUT), True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.ones(2, IN + 1)), "in_features"),
        (dict(x=torch.ones(2, IN, dtype=torch.int64)), "floating"),
        (dict(x=torch.tensor(1.0)), "0-d"),
        (dict(codes=torch.zeros(45, dtype=torch.uint8)), "codes is"),
        (dict(absmax=torch.zeros(3)), "absmax is"),
        (dict(absmax_scale=None), "come together"),
        (dict(absmax_offset=torch.zeros(1)), "absmax_offset is"),
        (dict(bias=torch.zeros(OUT + 1)), "bias is"),
        (dict(block_size=48), "block_size is 48"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_arguments_that_do_not_fit_are_refused_before_anything_is_read(change, message, device):
    nf4, _ = _stored()
    arguments = dict(
        x=torch.ones(2, IN), **nf4._asdict(), bias=None, out_features=OUT, in_features=IN, block_size=BLOCK,
        transposed=False, compute_dtype=torch.float32,
    )  # fmt: skip
    arguments.update(change)
    moved = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in arguments.items()}
    with pytest.raises(RuntimeError, match=message):
        op(**moved)


def test_tables_first_met_in_inference_mode_serve_training_too():
    kept_tables.cache_clear()
    nf4, _ = _stored()
    x = _randn(3, IN).requires_grad_()
    with torch.inference_mode():
        y = op(x, *nf4, None, OUT, IN, BLOCK, False, torch.float32)
    z = op(x, *nf4, None, OUT, IN, BLOCK, False, torch.float32)
    z.sum().backward()
    assert torch.equal(y, z)
