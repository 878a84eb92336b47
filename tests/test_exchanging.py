"""A killed export leaves, to whoever reads by the manifest, the old model with its adapters or the new one with its
own. Every rename and removal is a moment to be killed at: the folder as it stands before each is kept, and read.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lrcompile
from lrcompile import AdapterError, ExportError
from lrcompile.deployment.exchanging import exchanging
from lrcompile.state import state_of
from lrcompile.verifying.manifest import REPLACES, artefact, described, manifest_of, sha256

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

WIDTH, HIDDEN = 48, 360  # more weights than a graph holds itself: a data file is exchanged too
X = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(3))
RENAMED, REMOVED = os.replace, Path.unlink


def _model(version: int, *adapters: str) -> nn.Module:
    torch.manual_seed(version)
    model = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, WIDTH)).eval()
    for number, name in enumerate(adapters):
        lrcompile.apply(model, lrcompile.spec("lora", rank=2 + number, targets=["0", "2"]), name=name)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.1)
    return model


def _export(path: Path, model: nn.Module) -> dict[str, torch.Tensor]:
    """Export it; what its base and each adapter compute."""
    lrcompile.export(model, path, (X,), adapters="inputs")
    found = {}
    with torch.no_grad():
        with lrcompile.disabled(model):
            found[""] = model(X)
        for name in state_of(model).specs:
            lrcompile.activate(model, [name])
            found[name] = model(X)
    return found


def _read(path: Path) -> dict[str, torch.Tensor]:
    session = lrcompile.run(path)
    return {name: next(iter(session.run((X,), name or ()).values())) for name in ("", *session.adapters)}


def _is(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-4) for name in found
    )


@pytest.fixture
def moments(tmp_path_factory, monkeypatch) -> Callable[[Callable[[], Any], Path], list[Path]]:
    """The folder before each rename and removal of an action."""

    def record(action: Callable[[], Any], folder: Path) -> list[Path]:
        kept: list[Path] = []
        place = tmp_path_factory.mktemp("moments")

        def keep() -> None:
            kept.append(place / str(len(kept)))
            shutil.copytree(folder, kept[-1])

        def replace(*names: Any) -> None:
            keep()
            RENAMED(*names)

        def unlink(place: Path, missing_ok: bool = False) -> None:
            if place.exists() and place.parent == folder:
                keep()
            REMOVED(place, missing_ok)

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", replace)
            patched.setattr(Path, "unlink", unlink)
            action()
        return kept

    return record


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "shipped").mkdir()
    return tmp_path / "shipped"


def test_every_moment_of_an_export_over_another_is_the_old_one_or_the_new_one(moments, folder):
    path = folder / "m.onnx"
    old = _export(path, _model(0, "same-name", "old-only"))
    new: dict[str, torch.Tensor] = {}
    kept = moments(lambda: new.update(_export(path, _model(1, "same-name", "new-only"))), folder)
    versions, between = [], []
    for moment in kept:
        found = _read(moment / "m.onnx")
        assert _is(found, old) or _is(found, new), moment
        versions.append(_is(found, new))
        between.append(REPLACES in json.loads((moment / "m.manifest.json").read_text()))
    assert versions == sorted(versions)  # one moment of change
    assert {(True, False), (True, True), (False, False)} <= set(zip(between, versions, strict=True))
    assert _is(_read(path), new)


def test_after_a_kill_at_any_moment_the_next_export_leaves_only_its_own_files(moments, folder):
    path = folder / "m.onnx"
    _export(path, _model(0, "same-name", "old-only"))
    kept = moments(lambda: _export(path, _model(1, "same-name", "new-only")), folder)
    for moment in (kept[0], kept[len(kept) // 2], kept[-2], kept[-1]):
        last = _export(moment / "m.onnx", _model(2, "third"))
        assert _is(_read(moment / "m.onnx"), last)
        listed = described(moment / "m.onnx")["sha256"]
        left = {entry.name for entry in moment.iterdir() if not entry.name.startswith(".")}
        assert left == {*listed, "m.manifest.json"}
        assert not list(moment.glob(".*.onnx_adapter"))


def test_a_kill_in_the_export_after_a_kill_is_again_the_old_one_or_the_new_one(moments, folder):
    path = folder / "m.onnx"
    _export(path, _model(0, "same-name", "old-only"))
    kept = moments(lambda: _export(path, _model(1, "same-name", "new-only")), folder)
    waiting = [moment for moment in kept if list(moment.glob(".*.onnx_adapter"))]
    for interrupted in (waiting[0], waiting[-1]):  # before and after the model's rename
        before, after = _read(interrupted / "m.onnx"), dict[str, torch.Tensor]()
        again = moments(
            lambda at=interrupted, to=after: to.update(_export(at / "m.onnx", _model(2, "same-name"))), interrupted
        )
        for moment in again:
            found = _read(moment / "m.onnx")
            assert _is(found, before) or _is(found, after), moment


def test_every_moment_of_writing_one_more_adapter_is_the_old_one_or_the_new_one(moments, folder):
    path = folder / "m.onnx"
    model = _model(0, "kept", "written")
    old = _export(path, model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "written" in name:
                parameter.normal_(std=0.1)
        lrcompile.activate(model, ["written"])
        new = {**old, "written": model(X)}
    kept = moments(lambda: lrcompile.export_adapter(model, path, "written"), folder)
    versions = []
    for moment in kept:
        found = _read(moment / "m.onnx")
        assert _is(found, old) or _is(found, new), moment
        versions.append(_is(found, new))
    assert versions == sorted(versions)
    assert set(versions) == {False, True}
    assert _is(_read(path), new)
    assert not list(folder.glob(".*"))


def test_adapters_of_a_replaced_model_go_and_files_that_are_not_its_own_stay(folder):
    path = folder / "m.onnx"
    _export(path, _model(0, "a", "changed"))
    (folder / "m.changed.onnx_adapter").write_bytes(b"somebody else's")
    (folder / "m.other.onnx_adapter").write_bytes(b"never ours")
    _export(path, _model(1, "b"))
    assert sorted(entry.name for entry in folder.glob("*.onnx_adapter")) == [
        "m.b.onnx_adapter", "m.changed.onnx_adapter", "m.other.onnx_adapter",
    ]  # fmt: skip


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("fails", range(4))
def test_a_rename_that_fails_before_the_model_is_exchanged_leaves_every_file_as_it_was(
    folder, monkeypatch, existing, fails
):
    path = folder / "m.bin"
    if existing:
        _exchange(path, b"old", {"m.a.onnx_adapter": b"old a"})
    before = {entry.name: entry.read_bytes() for entry in folder.iterdir()}
    calls = []

    def replace(*names: Any) -> None:
        calls.append(names)
        if len(calls) == fails + 1 and Path(names[1]) != path.with_name("m.a.onnx_adapter"):
            raise OSError("no more")
        RENAMED(*names)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(ExportError, match="no more"):
        _exchange(path, b"new", {"m.a.onnx_adapter": b"new a", "m.b.onnx_adapter": b"new b"})
    assert {entry.name: entry.read_bytes() for entry in folder.iterdir()} == before


def _exchange(path: Path, model: bytes, adapters: dict[str, bytes]) -> None:
    hashes = {}
    with exchanging(path) as exchange:
        for name, content in {path.name: model, **adapters}.items():
            file = exchange.model() if name == path.name else exchange.adapter(name)
            file.write_bytes(content)
            hashes[name] = sha256(file)
        exchange.commit({"schema": 1, "sha256": hashes})


def test_a_manifest_inside_another_is_held_to_the_schema_too(folder):
    path = folder / "m.onnx"
    _exchange(path, b"old", {})
    manifest = manifest_of(path)
    data = json.loads(manifest.read_text())
    replaced: Any
    for replaced in ("text", 3, [0], {"schema": 7}):
        manifest.write_text(json.dumps({**data, REPLACES: replaced}))
        with pytest.raises(lrcompile.VerificationError, match="replaces"):
            described(path)


def test_onnx_and_pt2_of_one_name_have_a_manifest_each(folder):
    for name in ("m.onnx", "m.pt2"):
        _exchange(folder / name, name.encode(), {})
    assert not artefact(folder / "m.onnx").stale
    assert not artefact(folder / "m.pt2").stale
    shutil.copy(folder / "m.onnx", folder / "copy.onnx")
    shutil.copy(folder / "m.manifest.json", folder / "copy.manifest.json")
    assert any("not copy.onnx" in reason for reason in artefact(folder / "copy.onnx").stale)


def test_a_hash_that_is_none_names_no_file(folder):
    path = folder / "m.onnx"
    _export(path, _model(0, "a"))
    manifest = manifest_of(path)
    data = json.loads(manifest.read_text())
    data["sha256"]["m.a.onnx_adapter"] = "../../../etc/passwd"
    manifest.write_text(json.dumps(data))
    with pytest.raises(AdapterError, match="hashes"):
        lrcompile.run(path, adapters="a")
