"""The settings a file runs under are part of what is verified: pinned, recorded, and replayed from its manifest."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lrcompile
from lrcompile.verification import verify

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

LEVEL = "session.qdq_matmulnbits_accuracy_level"
ROWS, WIDE, OUT, BLOCK = 9, 128, 48, 32


@pytest.fixture
def int4(tmp_path: Path) -> tuple[nn.Module, Path]:
    """y = x·dq(W) with W in 4 bits, which ONNX Runtime fuses; and the same product in torch."""
    generator = np.random.default_rng(0)
    codes = generator.integers(-8, 8, (WIDE, OUT)).astype(np.int8)
    scales = generator.uniform(0.01, 0.1, (WIDE // BLOCK, OUT)).astype(np.float32)
    make, proto = onnx.helper.make_node, onnx.TensorProto
    flat = codes.reshape(-1)
    packed = (flat[0::2] & 0xF) | ((flat[1::2] & 0xF) << 4)
    weight = onnx.helper.make_tensor("w", proto.INT4, codes.shape, packed.astype(np.uint8).tobytes(), raw=True)
    graph = onnx.helper.make_graph(
        [
            make("DequantizeLinear", ["w", "s"], ["wf"], axis=0, block_size=BLOCK),
            make("MatMul", ["x", "wf"], ["output"]),
        ],
        "int4",
        [onnx.helper.make_tensor_value_info("x", proto.FLOAT, [ROWS, WIDE])],
        [onnx.helper.make_tensor_value_info("output", proto.FLOAT, [ROWS, OUT])],
        [weight, onnx.numpy_helper.from_array(scales, "s")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "model.onnx")
    linear = nn.Linear(WIDE, OUT, bias=False)
    linear.weight.data = torch.from_numpy((codes * np.repeat(scales, BLOCK, 0)).T.copy())
    return linear, tmp_path / "model.onnx"


def asks(path: Path, level: str) -> None:
    path.with_suffix(".manifest.json").write_text(json.dumps({"schema": 1, "session": {"config": {LEVEL: level}}}))


def test_4_bit_weights_are_run_with_float_activations_unless_a_manifest_says_otherwise(
    int4: tuple[nn.Module, Path],
) -> None:
    linear, path = int4
    inputs = (torch.randn(ROWS, WIDE),)
    verdict = verify(linear, path, inputs)
    assert verdict.ok, str(verdict)
    assert verdict.bound_ratio < 8
    assert verdict.session["model.onnx"]["config"] == {LEVEL: "0"}
    asks(path, "4")
    replayed = verify(linear, path, inputs)
    assert replayed.session["model.onnx"]["config"] == {LEVEL: "4"}
    assert not replayed.ok, "int8 activations are an approximation that nobody declared"
    assert replayed.bound_ratio > 400
    asks(path, "0")
    assert verify(linear, path, inputs).ok


def test_graphs_are_held_to_each_other_under_each_ones_own_settings(
    int4: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    _, path = int4
    other = tmp_path / "other.onnx"
    other.write_bytes(path.read_bytes())
    asks(other, "4")
    inputs = (torch.randn(ROWS, WIDE),)
    verdict = verify(path, other, inputs)
    assert not verdict.ok
    assert verdict.session["reference: model.onnx"]["config"] == {LEVEL: "0"}
    assert verdict.session["other.onnx"]["config"] == {LEVEL: "4"}
    asks(other, "0")
    assert verify(path, other, inputs).bound_ratio == 0


@pytest.mark.parametrize("session", [{"config": {"session.load_model_format": "ORT"}}, {"threads": 10**6}, {"gpu": 1}])
def test_a_manifest_may_not_set_anything_else(int4: tuple[nn.Module, Path], session: dict[str, object]) -> None:
    linear, path = int4
    path.with_suffix(".manifest.json").write_text(json.dumps({"schema": 1, "session": session}))
    with pytest.raises(lrcompile.VerificationError, match="session"):
        verify(linear, path, (torch.randn(ROWS, WIDE),))
