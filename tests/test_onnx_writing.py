"""Writing an ONNX model: the old model or the new one, whole, whatever fails and whenever."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lrcompile.errors import ExportError

onnx = pytest.importorskip("onnx")
ir = pytest.importorskip("onnx_ir")
ort = pytest.importorskip("onnxruntime")

from lrcompile.interop import onnx_writing  # noqa: E402  (needs the packages above)

SIZE = 160  # 100 KiB of weights: over what a model holds itself


def model(value: float, size: int = SIZE) -> Any:
    """x → x·W₁·W₂ with W₁ = W₂ = value·I."""
    held = [onnx.numpy_helper.from_array(value * np.eye(size, dtype=np.float32), name) for name in ("one", "two")]
    nodes = [onnx.helper.make_node("MatMul", [a, b], [c]) for a, b, c in (("x", "one", "h"), ("h", "two", "y"))]
    ports = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", size]) for name in "xy"]
    graph = onnx.helper.make_graph(nodes, "g", ports[:1], ports[1:], held)
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    return ir.serde.deserialize_model(proto)


def write(value: float, path: Path, size: int = SIZE) -> dict[str, str]:
    manifest: dict[str, Any] = {"schema": 1}
    onnx_writing.write(model(value, size), path, {}, manifest)
    return manifest["sha256"]


def answer(path: Path, size: int = SIZE) -> float:
    """value² of the model on disk."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return float(session.run(None, {"x": np.ones((1, size), np.float32)})[0][0, 0])


def _content(folder: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in folder.iterdir()}


def test_large_weights_lie_beside_the_model_under_the_name_of_their_content(tmp_path):
    hashes = write(3.0, tmp_path / "m.onnx")
    data = next(name for name in hashes if name.endswith(".data"))
    assert re.fullmatch(r"m\.[0-9a-f]{12}\.data", data)
    assert data.split(".")[1] == hashes[data][:12]
    assert sorted(_content(tmp_path)) == sorted([data, "m.manifest.json", "m.onnx"])
    located = onnx.load(tmp_path / "m.onnx", load_external_data=False).graph.initializer
    assert {entry.value for tensor in located for entry in tensor.external_data if entry.key == "location"} == {data}
    assert (tmp_path / "m.onnx").stat().st_size < 4096
    assert answer(tmp_path / "m.onnx") == 9.0


def test_small_weights_stay_inside(tmp_path):
    write(3.0, tmp_path / "m.onnx", 20)
    assert sorted(_content(tmp_path)) == ["m.manifest.json", "m.onnx"]
    assert answer(tmp_path / "m.onnx", 20) == 9.0


def test_writing_again_replaces_the_data_file_and_spares_others(tmp_path):
    (tmp_path / "m.notours.data").write_text("x")
    (tmp_path / "n.0123456789ab.data").write_text("x")
    write(3.0, tmp_path / "m.onnx")
    write(2.0, tmp_path / "m.onnx")
    assert answer(tmp_path / "m.onnx") == 4.0
    names = sorted(_content(tmp_path))
    assert len(names) == 5
    assert {"m.notours.data", "n.0123456789ab.data"} < set(names)


def test_one_weight_is_in_memory_at_a_time(tmp_path, monkeypatch):
    alive: list[int] = []
    most: list[int] = []

    class Weight(np.ndarray):
        pass

    def computed() -> Any:
        array = np.eye(SIZE, dtype=np.float32).view(Weight)
        alive.append(0)
        weakref.finalize(array, alive.pop)
        most.append(len(alive))
        return ir.Tensor(array)

    lazy = model(1.0)
    for name in ("one", "two"):
        value = lazy.graph.initializers[name]
        value.const_value = ir.LazyTensor(computed, dtype=ir.DataType.FLOAT, shape=ir.Shape([SIZE, SIZE]), name=name)
    onnx_writing.write(lazy, tmp_path / "m.onnx", {}, {})
    assert most == [1, 1]  # each computed once, the first gone before the second
    assert answer(tmp_path / "m.onnx") == 1.0


def _failing(call: int, raised: BaseException):
    calls = []

    def fail(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            raise raised
        return original(*args, **kwargs)

    original = onnx_writing._Hashed.append
    return fail


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("raised", [FULL, KeyboardInterrupt()])
@pytest.mark.parametrize("place", ["first weight", "second weight", "graph", "check", "manifest"])
def test_a_failure_anywhere_leaves_the_folder_as_it_was(tmp_path, monkeypatch, place, raised, existing):
    path = tmp_path / "m.onnx"
    if existing:
        write(3.0, path)
    before = _content(tmp_path)

    def fail(*args, **kwargs):
        raise raised

    if place in ("first weight", "second weight"):
        monkeypatch.setattr(onnx_writing._Hashed, "append", _failing(1 if place == "first weight" else 2, raised))
    elif place == "manifest":
        monkeypatch.setattr("lrcompile.deployment.exchanging.encoded", fail)
    else:
        monkeypatch.setattr(onnx_writing, {"graph": "_serialized", "check": "_try"}[place], fail)
    with pytest.raises(ExportError if raised is FULL else KeyboardInterrupt) as caught:
        write(2.0, path)
    assert raised is not FULL or "No space left" in str(caught.value)
    assert _content(tmp_path) == before


@pytest.mark.parametrize("flaw", ["opset", "operator"])
def test_a_model_the_runtime_refuses_is_not_written(tmp_path, flaw):
    refused = model(3.0)
    if flaw == "opset":
        refused.graph.opset_imports[""] = 27
    else:
        refused.graph[0].op_type = "MatMulOfAnotherKind"
    with pytest.raises(ExportError, match="nothing was written"):
        onnx_writing.write(refused, tmp_path / "m.onnx", {}, {})
    assert _content(tmp_path) == {}


def test_bfloat16_is_refused_with_the_remedy(tmp_path):
    held = model(3.0)
    for name in ("one", "two"):
        value = held.graph.initializers[name]
        value.const_value = ir.Tensor(np.zeros((SIZE, SIZE), np.uint16), dtype=ir.DataType.BFLOAT16, name=name)
        value.dtype = ir.DataType.BFLOAT16
    for value in (*held.graph.inputs, *held.graph.outputs):
        value.dtype = ir.DataType.BFLOAT16
    with pytest.raises(ExportError, match=r"model\.float\(\)"):
        onnx_writing.write(held, tmp_path / "m.onnx", {}, {})
    assert _content(tmp_path) == {}


def test_an_unwritable_folder_is_an_error_that_names_the_path(tmp_path):
    with pytest.raises(ExportError, match=r"nowhere.*m\."):
        write(3.0, tmp_path / "nowhere" / "m.onnx")


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from typing import Any
import test_onnx_writing as test
path = Path(sys.argv[2])
test.write(3.0, path)
for moment in (1, 2, 3, 4):
    child = os.fork()
    if child == 0:
        replace, calls = os.replace, []
        def killing(*args):
            calls.append(args)
            if len(calls) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*args)
        os.replace = killing
        test.write(2.0, path)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    print(test.answer(path), flush=True)
"""


def test_a_process_killed_at_any_rename_leaves_a_whole_model(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(tmp_path / "m.onnx")],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "9.0",
        "9.0",
        "9.0",
        "4.0",
    ]  # old while data, manifest and model wait, new once it is renamed
    assert signal.SIGKILL == 9
