"""Atomic writing: old content whole or new content whole, whatever happens in between."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lrcompile import writing
from lrcompile.errors import ExportError, LrcompileError
from lrcompile.writing import atomic_file, atomic_folder


def _write_half_and_raise(context, raised: BaseException) -> None:
    with context as temporary:
        (temporary / "half" if temporary.is_dir() else temporary).write_text("half")
        raise raised


def _entries(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_file_is_replaced_on_success_and_keeps_its_mode(tmp_path):
    target = tmp_path / "a.json"
    target.write_text("old")
    target.chmod(0o640)
    with atomic_file(target) as temporary:
        assert temporary.suffix == ".json"
        assert temporary.parent == tmp_path
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o640
    assert _entries(tmp_path) == ["a.json"]


@pytest.mark.parametrize("raised", [ValueError("x"), KeyboardInterrupt(), SystemExit(3)])
@pytest.mark.parametrize("existing", [True, False])
def test_any_failure_leaves_the_old_file_and_no_temporary(tmp_path, raised, existing):
    target = tmp_path / "a.bin"
    if existing:
        target.write_text("old")
    with pytest.raises(type(raised)):
        _write_half_and_raise(atomic_file(target), raised)
    assert _entries(tmp_path) == (["a.bin"] if existing else [])
    assert not existing or target.read_text() == "old"


def test_disk_full_becomes_the_typed_error_and_names_the_path(tmp_path):
    target = tmp_path / "a.bin"
    target.write_text("old")
    with pytest.raises(ExportError, match=r"a\.bin.*No space left") as caught, atomic_file(target, error=ExportError):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert isinstance(caught.value.__cause__, OSError)
    assert target.read_text() == "old"
    assert _entries(tmp_path) == ["a.bin"]


def test_a_failing_fsync_leaves_the_old_file(tmp_path, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = tmp_path / "a.bin"
    target.write_text("old")
    monkeypatch.setattr(writing, "sync", full)
    with pytest.raises(LrcompileError, match="No space left"), atomic_file(target) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "old"
    assert _entries(tmp_path) == ["a.bin"]


def test_a_missing_folder_is_found_before_the_body_runs(tmp_path):
    with pytest.raises(LrcompileError, match="nowhere"), atomic_file(tmp_path / "nowhere" / "a.bin"):
        pytest.fail("the body ran")


def test_a_file_never_replaces_a_folder_nor_a_folder_a_file(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")
    with pytest.raises(LrcompileError, match="is a folder"), atomic_file(tmp_path / "folder"):
        pytest.fail("the body ran")
    with pytest.raises(LrcompileError, match="is a file"), atomic_folder(tmp_path / "file"):
        pytest.fail("the body ran")
    assert _entries(tmp_path) == ["file", "folder"]


def test_a_link_is_written_through(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with atomic_file(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


@pytest.mark.parametrize("exchange", [True, False])
def test_folder_is_exchanged_whole(tmp_path, monkeypatch, exchange):
    if not exchange:  # as on a system without renameat2
        monkeypatch.setattr(writing.sys, "platform", "other")
    target = tmp_path / "adapter"
    target.mkdir()
    (target / "stale").write_text("old")
    with atomic_folder(target) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "config").write_text("new")
        assert _entries(target) == ["stale"]
    assert _entries(target) == ["inner"]
    assert (target / "inner" / "config").read_text() == "new"
    assert _entries(tmp_path) == ["adapter"]


def test_kept_entries_are_carried_over_unless_written_anew(tmp_path):
    target = tmp_path / "adapter"
    (target / "other").mkdir(parents=True)
    (target / "other" / "weights").write_text("other")
    (target / "optimizer.pt").write_text("old")
    (target / "config").write_text("old")
    with atomic_folder(target, keep=lambda name: name != "gone") as temporary:
        (temporary / "config").write_text("new")
    assert _entries(target) == ["config", "optimizer.pt", "other"]
    assert (target / "config").read_text() == "new"
    assert (target / "other" / "weights").read_text() == "other"


@pytest.mark.parametrize("raised", [ValueError("x"), KeyboardInterrupt()])
def test_any_failure_leaves_the_old_folder_and_no_made_parents(tmp_path, raised):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "a").write_text("a")
    for target in (tmp_path / "old", tmp_path / "x" / "y" / "new"):
        with pytest.raises(type(raised)):
            _write_half_and_raise(atomic_folder(target), raised)
    assert _entries(tmp_path) == ["old"]
    assert _entries(tmp_path / "old") == ["a"]


def test_when_the_second_rename_fails_the_old_folder_is_put_back(tmp_path, monkeypatch):
    target = tmp_path / "adapter"
    target.mkdir()
    (target / "a").write_text("old")
    rename, calls = os.rename, []

    def failing(source, destination):
        calls.append(source)
        if len(calls) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, destination)

    monkeypatch.setattr(writing.sys, "platform", "other")
    monkeypatch.setattr(writing.os, "rename", failing)
    with pytest.raises(LrcompileError, match="Input/output error"), atomic_folder(target) as temporary:
        (temporary / "a").write_text("new")
    assert (target / "a").read_text() == "old"
    assert _entries(tmp_path) == ["adapter"]


def test_a_killed_process_leaves_the_old_content(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_text("old")
    script = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        from lrcompile.writing import atomic_file, atomic_folder
        root = Path(sys.argv[1])
        with atomic_file(root / "file") as f, atomic_folder(root / "folder") as d:
            f.write_text("new")
            (d / "a").write_text("new")
            os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "file").read_text() == "old"
    assert (tmp_path / "folder" / "a").read_text() == "old"
    assert all(name.startswith(".") for name in _entries(tmp_path) if name not in ("file", "folder"))
