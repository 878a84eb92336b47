"""Exported graphs mutated a thousand times by somebody who also puts the manifest's hashes right: refused with a typed
error, or run. No crash, no hang, no memory beyond bounds.

A crash of a runtime takes its process along, so every file is opened in a fork of a process that has loaded the
libraries and nothing else.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lrcompile
from lrcompile.errors import LrcompileError

COUNT = 1200
SECONDS, MEMORY = 20, 3 << 30
X = torch.linspace(-1, 1, 3 * 64).reshape(3, 64)
FORMS: dict[str, dict[str, Any]] = {
    "merge": {},
    "inline": {"adapters": "inline"},
    "nf4": {"quantize": "nf4", "adapters": "merge"},
    "int8": {"quantize": "nf4", "adapters": "merge", "nf4_form": "int8"},
    "inputs": {"adapters": "inputs"},
}
EXTREME = (-1, 0, 1, 2, 3, 7, 63, 65, 2**16, 2**31 - 1, 2**31, 2**62, -(2**63))
OPERATORS = ("MatMul", "Gemm", "Gather", "Reshape", "Cast", "Add", "Loop", "If", "Scan", "MatMulNBits", "MatMulBnb4",
             "ConstantOfShape", "Expand", "Tile", "Range", "Resize", "Conv", "Nonexistent")  # fmt: skip


def model() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)).eval()
    lrcompile.apply(net, lrcompile.spec("lora", rank=4, targets=["0", "2"]))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.1)
    return net


# Mutations: each changes a ModelProto, or returns other bytes for the file


def bytes_flipped(proto: Any, chance: random.Random) -> bytes:
    content = bytearray(proto.SerializeToString())
    for _ in range(chance.randint(1, 8)):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    return bytes(content)


def cut(proto: Any, chance: random.Random) -> bytes:
    content = proto.SerializeToString()
    return content[: chance.randrange(len(content))]


def repeated(proto: Any, chance: random.Random) -> bytes:
    content = proto.SerializeToString()
    start = chance.randrange(len(content))
    return content[:start] + content[start : start + chance.randrange(1, 400)] * 3 + content[start:]


def tensor_sizes(proto: Any, chance: random.Random) -> None:
    tensor = chance.choice(proto.graph.initializer)
    if tensor.dims and chance.random() < 0.7:
        tensor.dims[chance.randrange(len(tensor.dims))] = chance.choice(EXTREME)
    else:
        tensor.dims.append(chance.choice(EXTREME))


def tensor_content(proto: Any, chance: random.Random) -> None:
    tensor = chance.choice(proto.graph.initializer)
    match chance.randrange(3):
        case 0:
            tensor.data_type = chance.randrange(0, 28)
        case 1:
            tensor.raw_data = tensor.raw_data[: chance.randrange(len(tensor.raw_data) + 1)]
        case 2:
            entry = tensor.external_data.add()
            entry.key = chance.choice(["location", "offset", "length"])
            entry.value = chance.choice(["../a", "-1", "9e9"])
            tensor.data_location = 1


def node_changed(proto: Any, chance: random.Random) -> None:
    node = chance.choice(proto.graph.node)
    match chance.randrange(6):
        case 0:
            node.op_type = chance.choice(OPERATORS)
        case 1:
            node.domain = chance.choice(["", "com.microsoft", "ai.onnx.ml", "evil"])
        case 2 if node.input:
            names = [value for each in proto.graph.node for value in each.output]
            node.input[chance.randrange(len(node.input))] = chance.choice([*names, "", "nowhere"])
        case 3 if node.input:
            node.input.pop()
        case 4:
            proto.graph.node.add().CopyFrom(node)
        case _:
            node.output.append(node.output[0])


def attribute_changed(proto: Any, chance: random.Random) -> None:
    nodes = [node for node in proto.graph.node if node.attribute]
    if not nodes:
        return
    attribute = chance.choice(chance.choice(nodes).attribute)
    if attribute.ints and chance.random() < 0.5:
        attribute.ints[chance.randrange(len(attribute.ints))] = chance.choice(EXTREME)
    else:
        attribute.i = chance.choice(EXTREME)
        attribute.type = chance.choice([2, 2, 2, 1, 7])


def ports_changed(proto: Any, chance: random.Random) -> None:
    port = chance.choice([*proto.graph.input, *proto.graph.output])
    match chance.randrange(4):
        case 0:
            port.name = chance.choice(["", "output", "nowhere"])
        case 1:
            port.type.tensor_type.elem_type = chance.randrange(0, 28)
        case 2 if port.type.tensor_type.shape.dim:
            chance.choice(port.type.tensor_type.shape.dim).dim_value = chance.choice(EXTREME)
        case _:
            proto.opset_import[0].version = chance.choice([0, 1, 7, 13, 26, 27, 2**40])


MUTATIONS: tuple[Callable[[Any, random.Random], bytes | None], ...] = (
    bytes_flipped, bytes_flipped, cut, repeated, tensor_sizes, tensor_content, node_changed, node_changed,
    attribute_changed, attribute_changed, ports_changed,
)  # fmt: skip


def mutate(folder: Path, turn: int) -> str:
    """Change the graph in `folder` and seal its manifest again; what was done."""
    import onnx

    chance, path = random.Random(turn), folder / "m.onnx"
    proto = onnx.load(path, load_external_data=False)
    mutation = chance.choice(MUTATIONS)
    content = mutation(proto, chance)
    path.write_bytes(proto.SerializeToString() if content is None else content)
    if turn % 4 == 0 and (data := sorted(folder.glob("*.data"))):
        held = bytearray(data[0].read_bytes())
        held[chance.randrange(len(held))] ^= 255
        data[0].write_bytes(held[: chance.randrange(len(held))] if chance.random() < 0.5 else held)
    manifest = folder / "m.manifest.json"
    described = json.loads(manifest.read_text())
    from lrcompile.verifying.manifest import sha256

    described["sha256"] = {name: sha256(folder / name) for name in described["sha256"]}
    manifest.write_text(json.dumps(described))
    return mutation.__name__


def opened(folder: Path) -> str:
    try:
        session = lrcompile.run(folder / "m.onnx")
        session((X,))
    except LrcompileError:
        return "refused"
    return "ran"


def isolated(work: Callable[[], str], report: Path) -> str:
    report.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        code = 9
        try:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.alarm(SECONDS)
            report.write_text(work())
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        killed = signal.Signals(os.WTERMSIG(status))
        return "hung" if killed is signal.SIGALRM else f"crashed: {killed.name}"
    return report.read_text() if os.WEXITSTATUS(status) == 0 else "raised another error"


def drive(root: Path, count: int) -> None:
    import onnx  # noqa: F401
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    made = []
    for name, options in FORMS.items():
        (root / name).mkdir()
        lrcompile.export(model(), root / name / "m.onnx", (X,), **options)
        made.append(root / name)
    seen: Counter[str] = Counter()
    wrong: dict[str, list[str]] = {}
    for turn in range(count):
        source, folder = made[turn % len(made)], root / "mutated"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        what = mutate(folder, turn)
        found = isolated(lambda folder=folder: opened(folder), root / "report")  # type: ignore[misc]
        seen[found] += 1
        if found not in ("refused", "ran"):
            wrong.setdefault(found, []).append(f"turn {turn}: {source.name}, {what}")
            shutil.copytree(folder, root / f"wrong-{turn}")
    print(json.dumps({"seen": seen, "wrong": wrong}))


@pytest.mark.slow
def test_twelve_hundred_mutated_graphs_are_refused_or_run(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path), str(COUNT)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["wrong"] == {}
    assert sum(result["seen"].values()) == COUNT
    assert min(result["seen"]["refused"], result["seen"]["ran"]) > COUNT // 20, "the mutations no longer tell anything"


if __name__ == "__main__":
    torch.set_num_threads(1)
    drive(Path(sys.argv[1]), int(sys.argv[2]))
