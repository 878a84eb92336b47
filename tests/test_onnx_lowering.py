"""Lowering to ONNX: what ONNX Runtime accepts, weights unevaluated, NF4 codes bit for bit, names that users know."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lrcompile
from lrcompile.deployment.capture import capture
from lrcompile.errors import ExportError
from lrcompile.kernels.nf4_dequant import Nf4, decode_absmax
from lrcompile.nf4.modules import codes_of
from lrcompile.passes.base import Pending, Program
from lrcompile.passes.merge_lora import MergeLora

onnx = pytest.importorskip("onnx")
ir = pytest.importorskip("onnx_ir")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from lrcompile.interop.onnx_lowering import lower  # noqa: E402  (needs the packages above)
from lrcompile.interop.onnx_nf4 import has_kernel  # noqa: E402


def _run(model: Any, **feed: torch.Tensor) -> np.ndarray:
    data = ir.serde.serialize_model(model).SerializeToString()
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    return session.run(None, {name: value.numpy() for name, value in feed.items()})[0]


def _nf4_net(out: int, inner: int, block: int, *, double: bool, bias: bool, conv1d: bool = False) -> Any:
    torch.manual_seed(out)
    if conv1d:
        Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
        linear = Conv1D(out, inner)
    else:
        linear = nn.Linear(inner, out, bias=bias)
    net = nn.Sequential(linear)
    lrcompile.quantize(net, "nf4", block_size=block, double_quant=double, targets=["0"])
    return net


@pytest.mark.parametrize(
    ("out", "inner", "block", "double", "bias", "conv1d", "kernel"),
    [
        (33, 48, 64, True, True, False, True),  # blocks run across row ends, the last one is short
        (17, 9, 32, False, False, False, True),  # an odd number of elements
        (40, 64, 512, True, True, False, False),  # no kernel for this block size
        (24, 40, 64, True, True, True, False),  # no kernel for [in, out] storage
        (3, 5, 4096, False, False, False, False),  # neither, odd and shorter than a block
    ],
)
def test_nf4_codes_are_carried_over_bit_for_bit(out, inner, block, double, bias, conv1d, kernel):
    net = _nf4_net(out, inner, block, double=double, bias=bias, conv1d=conv1d)
    assert has_kernel(out, inner, block, conv1d) is kernel
    x = torch.randn(5, inner, generator=torch.Generator().manual_seed(0))
    model: Any = lower(capture(net, (x,)), {})
    nodes = [node for node in model.graph if node.op_type == "MatMulBnb4"]
    assert bool(nodes) is kernel
    held = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
    stored = Nf4(*codes_of(net[0]))
    assert np.array_equal(held["0.weight_codes"], stored.codes.numpy())
    if kernel:
        (node,) = nodes
        assert np.array_equal(node.inputs[2].const_value.numpy(), decode_absmax(stored).numpy())
        attributes = {key: value.value for key, value in node.attributes.items()}
        assert attributes == {"K": inner, "N": out, "block_size": block, "quant_type": 1, "transB": 1}
    name = str(model.graph.inputs[0].name)
    weight = net[0].weight.double().t() if conv1d else net[0].weight.double()
    exact = x.double() @ weight.t() + (0 if net[0].bias is None else net[0].bias.double())
    bound = 2**-24 * (x.double().abs() @ weight.t().abs() + exact.abs())
    assert ((torch.from_numpy(_run(model, **{name: x})) - exact).abs() / bound).max() <= 16


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.head = nn.Embedding(50, 40), nn.Linear(40, 45), nn.Linear(45, 50, bias=False)
        self.head.weight = nn.Parameter(torch.randn(50, 45))

    def forward(self, ids):
        return {"logits": self.head(self.inner(self.table(ids)).relu())}


def _ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def lowered() -> tuple[Any, Any, list[str]]:
    torch.manual_seed(0)
    net: Any = Net().eval()
    lrcompile.apply(net, lrcompile.spec("lora", rank=3, targets=["inner"]))
    nn.init.normal_(net.inner.lrcompile_adapters["weight"]["default"].B)
    captured = capture(net, {"ids": _ids(2, 6)})
    program, computed = Program(captured.program, net), []
    MergeLora().apply(program)

    def counted(name, weight):
        class Counted(Pending):
            def __call__(self):
                computed.append(name)
                return super().__call__()

        return Counted(weight.base, weight.dtype, weight.shape, weight.updates)

    model = lower(captured, {name: counted(name, weight) for name, weight in program.pending.items()})
    assert computed == [], "a folded weight was computed before it is written"
    return net, model, computed


def test_inputs_outputs_and_dimensions_have_the_models_names(lowered):
    _, model, _ = lowered
    assert [(value.name, list(map(str, value.shape))) for value in model.graph.inputs] == [
        ("ids", ["batch", "sequence"])
    ]
    assert [(value.name, list(map(str, value.shape))) for value in model.graph.outputs] == [
        ("logits", ["batch", "sequence", "50"])
    ]


def test_weights_keep_their_names_and_stand_the_way_they_are_read(lowered):
    net, model, _ = lowered
    held = model.graph.initializers
    assert np.array_equal(held["table.weight"].const_value.numpy(), net.table.weight.detach().numpy())
    assert np.array_equal(held["head.weight.T"].const_value.numpy(), net.head.weight.detach().numpy().T)
    assert not [node for node in model.graph if node.op_type == "Transpose"]


def test_a_folded_weight_is_computed_when_it_is_written(lowered):
    net, model, computed = lowered
    value = model.graph.initializers["inner.weight.T"].const_value.numpy()
    assert set(computed) == {"inner.weight"}
    adapter = net.inner.lrcompile_adapters["weight"]["default"]
    expected = net.inner.weight.detach() + adapter.scale * (adapter.B.detach() @ adapter.A.detach())
    assert np.array_equal(value, expected.numpy().T)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (6, 2), (3, 3)])
def test_batch_and_sequence_really_vary(lowered, shape):
    net, model, _ = lowered
    ids = _ids(*shape)
    with torch.no_grad():
        expected = net(ids)["logits"].numpy()
    # two products of at most 45 terms each, values up to ~40
    np.testing.assert_allclose(_run(model, ids=ids), expected, rtol=0, atol=100 * 45 * 2**-24)


def test_nothing_of_this_machine_is_in_the_file(lowered):
    _, model, _ = lowered
    data = ir.serde.serialize_model(model).SerializeToString()
    assert b"site-packages" not in data
    assert os.getcwd().encode() not in data


@pytest.mark.parametrize("opset", [18, 22, 25])
def test_every_opset_offered_is_one_the_runtime_loads(opset):
    net, x = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.LayerNorm(7)), torch.randn(3, 5)
    model = lower(capture(net, (x,)), {}, opset)
    assert model.opset_imports[""] == opset
    assert model.ir_version <= 13
    with torch.no_grad():
        np.testing.assert_allclose(_run(model, input=x), net(x).numpy(), rtol=0, atol=64 * 2**-24)


@pytest.mark.parametrize("opset", [17, 26, "20", True, 20.0])
def test_other_opsets_are_refused(opset):
    with pytest.raises(ExportError, match="from 18 to 25"):
        lower(None, {}, opset)  # type: ignore[arg-type]


def test_an_operation_without_an_onnx_form_is_named():
    class Spectrum(nn.Module):
        def forward(self, x):
            return torch.linalg.svdvals(x)

    with pytest.raises(ExportError, match=r"no ONNX form(.|\n)*svd"):
        lower(capture(Spectrum(), (torch.randn(3, 3),), "static"), {})


def test_an_operation_without_an_onnx_form_is_named_with_the_reason(tmp_path):
    class Unbatched(nn.Module):
        def forward(self, x):
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    with pytest.raises(ExportError, match="no ONNX form: Error when translating node") as raised:
        lrcompile.export(Unbatched(), tmp_path / "m.onnx", (torch.ones(2, 3, 4),))
    assert "See the stack trace" not in str(raised.value)
    assert ";" in str(raised.value)
