"""AOTInductor packages: what they hold, and that nothing else is left of writing one."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export.graph_signature import InputKind

import lrcompile
from lrcompile.errors import ExportError
from lrcompile.interop.aoti import _own_storages

MIB = 1 << 20
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _adapted() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(700, 800), nn.ReLU(), nn.Linear(800, 4)).eval()
    lrcompile.apply(model, lrcompile.spec("lora", rank=2, targets=["0"]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.05)
    return model


def _content(folder: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in folder.iterdir()}


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("raised", [RuntimeError("no compiler"), FULL, KeyboardInterrupt()])
def test_a_failure_while_compiling_leaves_files_and_model_as_they_were(tmp_path, monkeypatch, raised, existing):
    folder, elsewhere = tmp_path / "models", tmp_path / "tmp"
    folder.mkdir()
    elsewhere.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    if existing:
        (folder / "m.pt2").write_bytes(b"old")
        (folder / "m.pt2.manifest.json").write_bytes(b"{}")
    before, model = _content(folder), _adapted()
    seen: list[str] = []
    state = {name: (id(tensor), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}

    def fail(*args, **kwargs):
        seen.extend(set(os.listdir(folder)) - before.keys())
        raise raised

    monkeypatch.setattr(torch._inductor, "aot_compile", fail)
    with pytest.raises(KeyboardInterrupt if isinstance(raised, KeyboardInterrupt) else ExportError):
        lrcompile.export(model, folder / "m.pt2", (torch.randn(3, 700),))
    assert seen
    assert all(name.startswith(".") for name in seen)
    assert _content(folder) == before
    assert os.listdir(elsewhere) == []
    after = model.state_dict(keep_vars=True)
    assert state.keys() == after.keys()
    assert all(id(after[name]) == number and torch.equal(after[name], was) for name, (number, was) in state.items())


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, full_disk):
    with pytest.raises(ExportError, match=r"cannot write .*m\.pt2.*too large"):
        lrcompile.export(_adapted(), tmp_path / "m.pt2", (torch.randn(3, 700),))
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_a_killed_process_leaves_the_old_package_and_hidden_temporaries(tmp_path):
    (tmp_path / "m.pt2").write_bytes(b"old")
    script = """
        import os, signal, sys
        import torch, torch._inductor, lrcompile
        torch._inductor.aot_compile = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
        model = torch.nn.Sequential(torch.nn.Linear(700, 800))
        lrcompile.apply(model, lrcompile.spec("lora", rank=2, targets=["0"], init="gaussian"))
        lrcompile.export(model, sys.argv[1], (torch.randn(3, 700),))
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "m.pt2")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (kept,) = [entry for entry in tmp_path.iterdir() if not entry.name.startswith(".")]
    assert kept.read_bytes() == b"old"
    left = [entry for entry in tmp_path.rglob("*") if entry.is_file() and entry != kept]
    assert sum(entry.stat().st_size for entry in left) == 0  # folded weights lay in files without a name


class Counting(nn.Module):
    seen: torch.Tensor
    shift: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(3, 3)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("shift", torch.ones(3))

    def forward(self, x):
        self.seen.add_(1)
        return self.map(x) + self.shift * self.seen


def test_what_is_never_changed_is_a_parameter_and_what_is_stays_a_buffer(tmp_path):
    model, x = Counting().eval(), torch.randn(2, 3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*LeafSpec.* is deprecated", category=FutureWarning)
        lowered = torch.export.export(model, (x,)).run_decompositions()
        _own_storages(lowered, tmp_path)
        kinds = {spec.target: spec.kind for spec in lowered.graph_signature.input_specs if spec.target}
        assert kinds.pop("seen") is InputKind.BUFFER
        assert set(kinds) == {"map.weight", "map.bias", "shift"}
        assert set(kinds.values()) == {InputKind.PARAMETER}
        again = lowered.module()
    with torch.no_grad():
        for count in (1, 2):
            torch.testing.assert_close(again(x), model.map(x) + count)


class Tied(nn.Module):
    """Its parameters are parts of one storage, the embedding is also the head, and a buffer is as large."""

    shift: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.map = nn.Embedding(4000, 96), nn.Linear(96, 96)
        self.head = nn.Linear(96, 4000, bias=False)
        self.register_buffer("shift", torch.randn(4000, 96))
        whole, start = torch.randn(4000 * 96 + 96 * 96 + 96) * 0.1, 0
        for parameter in (self.embedding.weight, self.map.weight, self.map.bias):
            parameter.data = whole[start : start + parameter.numel()].view(parameter.shape)
            start += parameter.numel()
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.map(self.embedding(ids))) + self.shift.sum(1)


@pytest.mark.slow
def test_a_package_holds_each_weight_once_and_lies_alone_in_its_folder_of_any_name(tmp_path, monkeypatch):
    folder, elsewhere = tmp_path / "my 'models'; $(x)", tmp_path / "tmp"
    folder.mkdir()
    elsewhere.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    model = Tied().eval()
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    exported = lrcompile.export(model, folder / "a b.pt2", (torch.ones(2, 3, dtype=torch.long),))
    assert sorted(os.listdir(folder)) == ["a b.pt2", "a b.pt2.manifest.json"]
    libraries = [name for _, _, names in os.walk(elsewhere) for name in names if name.endswith(".so")]
    assert libraries == []
    assert weights < exported.path.stat().st_size < weights + 3 * MIB
    assert exported.verify().ok
