"""An ONNX file is checked before any runtime sees it: operators, versions, sizes, and where its data lie."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lrcompile.errors import VerificationError
from lrcompile.verification import verify

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from lrcompile.interop.onnx_safety import check  # noqa: E402 (needs onnx)

FLOAT, INT64, UINT8 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.UINT8


def model(*nodes: Any, tensors: tuple[Any, ...] = (), functions: tuple[Any, ...] = (), **more: Any) -> Any:
    x, y = (onnx.helper.make_tensor_value_info(name, FLOAT, [None, 4]) for name in "xy")
    nodes = nodes or (onnx.helper.make_node("MatMul", ["x", "w"], ["y"]),)
    graph = onnx.helper.make_graph(list(nodes), "g", [x], [y], initializer=list(tensors))
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("com.microsoft", 1)]
    return onnx.helper.make_model(graph, opset_imports=opsets, functions=list(functions), **{"ir_version": 10, **more})


def weight(**changes: Any) -> Any:
    tensor = onnx.numpy_helper.from_array(torch.eye(4).numpy(), "w")
    for key, value in changes.items():
        if key == "dims":
            del tensor.dims[:]
            tensor.dims.extend(value)
        else:
            setattr(tensor, key, value)
    return tensor


def outside(folder: Path, **entries: str) -> Any:
    """The weight as external data in `w.data`, its entries changed."""
    (folder / "w.data").write_bytes(torch.eye(4).numpy().tobytes())
    tensor = weight()
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": "w.data", "offset": "0", "length": "64", **entries}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def save(folder: Path, proto: Any) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


class Identity(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ torch.eye(4)


INPUTS = (torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),)


def test_plain_and_external_weights_are_accepted_and_run(tmp_path: Path) -> None:
    for tensor in (weight(), outside(tmp_path)):
        assert verify(Identity(), save(tmp_path, model(tensors=(tensor,))), INPUTS).ok


def test_functions_defined_in_the_file_are_accepted(tmp_path: Path) -> None:
    opset = [onnx.helper.make_opsetid("", 20)]
    body = [onnx.helper.make_node("Identity", ["a"], ["b"])]
    function = onnx.helper.make_function("mine", "same", ["a"], ["b"], body, opset)
    proto = model(onnx.helper.make_node("same", ["x"], ["y"], domain="mine"), functions=(function,))
    proto.opset_import.append(onnx.helper.make_opsetid("mine", 1))
    assert verify(Identity(), save(tmp_path, proto), INPUTS).ok


def bomb() -> Any:
    shape = onnx.numpy_helper.from_array(torch.tensor([1 << 20, 1 << 20]).numpy(), "s")
    return model(onnx.helper.make_node("ConstantOfShape", ["s"], ["y"]), tensors=(shape,))


def loop() -> Any:
    opset = [onnx.helper.make_opsetid("", 20)]
    body = [onnx.helper.make_node("again", ["a"], ["b"], domain="mine")]
    function = onnx.helper.make_function("mine", "again", ["a"], ["b"], body, opset)
    return model(onnx.helper.make_node("again", ["x"], ["y"], domain="mine"), functions=(function,))


def hidden() -> Any:
    """An unknown operator inside a branch."""
    branch = onnx.helper.make_graph(
        [onnx.helper.make_node("Evil", [], ["z"], domain="com.evil")], "b", [], [onnx.ValueInfoProto(name="z")]
    )
    return model(onnx.helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch))


def bnb4(**changes: int) -> Any:
    given = {"N": 4, "K": 4, "block_size": 16, "quant_type": 1, **changes}
    codes = onnx.helper.make_tensor("q", UINT8, [8], bytes(8), raw=True)
    maxima = onnx.helper.make_tensor("m", FLOAT, [1], [1.0])
    return model(
        onnx.helper.make_node("MatMulBnb4", ["x", "q", "m"], ["y"], domain="com.microsoft", **given),
        tensors=(codes, maxima),
    )


def nbits(**changes: int) -> Any:
    """Four rows of a block of sixteen 4-bit codes."""
    given = {"N": 4, "K": 4, "block_size": 16, "bits": 4, **changes}
    codes = onnx.helper.make_tensor("q", UINT8, [4, 1, 8], bytes(32), raw=True)
    scales = onnx.helper.make_tensor("s", FLOAT, [4, 1], [1.0] * 4)
    return model(
        onnx.helper.make_node("MatMulNBits", ["x", "q", "s"], ["y"], domain="com.microsoft", **given),
        tensors=(codes, scales),
    )


@pytest.mark.parametrize(
    ("proto", "message"),
    [
        (lambda: model(onnx.helper.make_node("Evil", ["x"], ["y"])), "Evil, which is not known"),
        (lambda: model(onnx.helper.make_node("Evil", ["x"], ["y"], domain="com.microsoft")), "com.microsoft.Evil"),
        (lambda: model(onnx.helper.make_node("Gelu", ["x"], ["y"], domain="com.evil")), "com.evil"),
        (hidden, "com.evil.Evil"),
        (loop, "calls itself"),
        (lambda: model(tensors=(weight(),), ir_version=14), "IR version 14"),
        (lambda: model(tensors=(weight(dims=[4, 5]),)), "its shape needs 80"),
        (lambda: model(tensors=(weight(dims=[-4, 4]),)), "has the shape"),
        (lambda: model(tensors=(weight(dims=[1 << 40, 1 << 40]),)), "has the shape"),
        (lambda: model(tensors=(weight(data_type=999),)), "unknown element type"),
        (bomb, "more than"),
        (lambda: bnb4(N=5), "are needed"),
        (lambda: bnb4(N=1 << 20, K=1 << 20), "must lie between"),
        (lambda: bnb4(block_size=24), "needs a block size"),
        (lambda: bnb4(transB=0), "transB = 1"),
        (lambda: nbits(N=5), "'q' has 32 elements, 40 are needed"),
        (lambda: nbits(K=17), "64 are needed"),
        (lambda: nbits(bits=8), "64 are needed"),
        (lambda: nbits(bits=3), "2, 4 or 8 bits"),
        (lambda: nbits(block_size=48), "needs a block size"),
        (lambda: nbits(N=1 << 20, K=1 << 20), "must lie between"),
    ],
)
def test_unknown_operators_versions_and_sizes_are_refused(
    tmp_path: Path, proto: Callable[[], Any], message: str
) -> None:
    with pytest.raises(VerificationError, match=message):
        check(save(tmp_path, proto()))


def test_an_opset_the_runtime_refuses_is_refused_first(tmp_path: Path) -> None:
    proto = model(tensors=(weight(),))
    proto.opset_import[0].version = 27
    with pytest.raises(VerificationError, match="opset 27"):
        check(save(tmp_path, proto))


@pytest.mark.parametrize("proto", [bnb4, nbits])
def test_an_accepted_quantized_operator_passes(tmp_path: Path, proto: Callable[[], Any]) -> None:
    check(save(tmp_path, proto()))


@pytest.mark.parametrize("content", [b"", b"not protobuf at all", b"\x08\x0a", b"\xff" * 100])
def test_what_is_no_onnx_file_or_truncated_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(VerificationError, match=r"model\.onnx"):
        verify(Identity(), path, INPUTS)


@pytest.mark.parametrize(
    "location", ["../w.data", "/etc/passwd", "a/../../w.data", "", ".", "a//b", "C:\\..\\w", "w\0.data"]
)
def test_external_data_stay_below_the_models_folder(tmp_path: Path, location: str) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    with pytest.raises(VerificationError, match="only a plain path"):
        check(save(inside, model(tensors=(outside(inside, location=location),))))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"length": str(1 << 30)}, "claims 1073741824"),
        ({"length": "32"}, "claims 32"),
        ({"offset": "1"}, "at 1 of"),
        ({"offset": "-64"}, "at -64"),
        ({"offset": "x"}, "no number"),
        ({"location": "missing.data"}, "missing"),
        ({"surprise": "1"}, "external-data keys"),
    ],
)
def test_external_data_lie_within_their_file(tmp_path: Path, entries: dict[str, str], message: str) -> None:
    with pytest.raises(VerificationError, match=message):
        check(save(tmp_path, model(tensors=(outside(tmp_path, **entries),))))


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    tensor = outside(tmp_path)
    tensor.external_data.add(key="location", value="other.data")
    with pytest.raises(VerificationError, match="external-data keys"):
        check(save(tmp_path, model(tensors=(tensor,))))


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_links_of_either_kind_are_refused(tmp_path: Path, link: Callable[..., None]) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    tensor = outside(inside)
    os.rename(inside / "w.data", tmp_path / "secret")
    link(tmp_path / "secret", inside / "w.data")
    with pytest.raises(VerificationError, match="link"):
        check(save(inside, model(tensors=(tensor,))))


def test_a_linked_folder_on_the_way_is_refused(tmp_path: Path) -> None:
    inside, other = tmp_path / "inside", tmp_path / "other"
    inside.mkdir()
    other.mkdir()
    tensor = outside(other, location="sub/w.data")
    os.symlink(other, inside / "sub")
    with pytest.raises(VerificationError, match="link"):
        check(save(inside, model(tensors=(tensor,))))


def test_the_total_is_bounded(tmp_path: Path) -> None:
    path = save(tmp_path, model(tensors=(weight(),)))
    check(path, max_bytes=64)
    with pytest.raises(VerificationError, match="more than 63 bytes"):
        check(path, max_bytes=63)


def test_wrong_inputs_are_a_typed_error_that_lists_both_sides(tmp_path: Path) -> None:
    path = save(tmp_path, model(tensors=(weight(),)))
    for inputs in ({"x": INPUTS[0], "more": INPUTS[0]}, (INPUTS[0], INPUTS[0])):
        with pytest.raises(VerificationError, match="takes the inputs x"):
            verify(Takes(), path, inputs)
    with pytest.raises(VerificationError, match="cannot run"):
        verify(nn.ReLU(), path, (INPUTS[0].half(),))


class Takes(nn.Module):
    def forward(self, x: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
        return x + more


def test_unknown_session_settings_are_refused(tmp_path: Path) -> None:
    from lrcompile.interop.onnxruntime import OnnxRunner

    path = save(tmp_path, model(tensors=(weight(),)))
    for session in ({"ep": "x"}, {"threads": 0}, {"graph_optimization_level": "O3"}, {"config": {"session.x": "1"}}):
        with pytest.raises(VerificationError, match="session"):
            OnnxRunner(path, session)
