"""Atomic writing: whoever looks, at any time and after any failure, finds the old content whole or the new one whole.

A temporary beside the target (same folder, so same filesystem), fsync, one rename, fsync of the folder. Any exception,
Ctrl-C included, removes the temporary and leaves the old content; a killed process leaves at worst a hidden temporary.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lrcompile.errors import LrcompileError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def atomic_file(path: str | os.PathLike[str], *, error: type[LrcompileError] = LrcompileError) -> Iterator[Path]:
    """Yield an empty temporary file of the same suffix; if the body succeeds it replaces `path`, else it vanishes.

    The folder must exist. An `OSError` (unwritable, disk full) becomes `error`, naming `path` and the cause.
    """
    with temporary_file(path, error=error) as temporary:
        yield temporary
        put(temporary, path, error=error)


@contextmanager
def temporary_file(path: str | os.PathLike[str], *, error: type[LrcompileError] = LrcompileError) -> Iterator[Path]:
    """Yield an empty file beside `path`, of the same suffix, that vanishes afterwards unless it was `put` somewhere.

    The folder must exist. An `OSError` becomes `error`, naming `path` and the cause.
    """
    target = Path(os.path.realpath(path))
    temporary = beside(target)
    with _reporting(path, error):
        if target.is_dir():
            raise IsADirectoryError(f"{path} is a folder, a file was to be written there")
        try:
            # created here, not by the body: an unwritable folder is found before the work, the mode follows the umask
            temporary.touch(exist_ok=False)
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)


def put(temporary: Path, path: str | os.PathLike[str], *, error: type[LrcompileError] = LrcompileError) -> None:
    """Rename `temporary`, once it is on the disk, to `path`, with the mode of what was there."""
    target = Path(os.path.realpath(path))
    with _reporting(path, error):
        if target.exists():
            shutil.copymode(target, temporary)
        sync(temporary)
        os.replace(temporary, target)
        _sync_folder(target.parent)


@contextmanager
def atomic_folder(
    path: str | os.PathLike[str],
    *,
    keep: Callable[[str], bool] | None = None,
    error: type[LrcompileError] = LrcompileError,
) -> Iterator[Path]:
    """Yield an empty temporary folder; if the body succeeds it takes the place of `path` as a whole, else it vanishes.

    Missing parents are made. Entries at the top of the old folder for which `keep(name)` holds, and which the body did
    not write, are carried over; all others go with the old folder. An `OSError` becomes `error`, naming `path` and why.
    """
    target = Path(os.path.realpath(path))
    temporary = beside(target)
    missing = [parent for parent in target.parents if not parent.exists()]
    with _reporting(path, error):
        if target.exists() and not target.is_dir():
            raise NotADirectoryError(f"{path} is a file, a folder was to be written there")
        try:
            temporary.mkdir(parents=True)
            yield temporary
            if keep is not None and target.exists():
                _carry_over(target, temporary, keep)
            for folder, _, files in os.walk(temporary):
                for name in files:
                    sync(Path(folder, name))
                _sync_folder(Path(folder))
            _exchange(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            for parent in missing:
                with suppress(OSError):  # somebody else may have put something there meanwhile
                    parent.rmdir()
            raise
        _sync_folder(target.parent)
        # after the exchange the temporary name holds the old content; failing to delete it does not undo the write
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_working_folder(path: str | os.PathLike[str], error: type[LrcompileError]) -> None:
    """Exchanging a folder would leave a process that works in it, or below, in the old one."""
    if Path.cwd().is_relative_to(Path(os.path.realpath(path))):
        raise error(
            f"{os.fspath(path)!r} is (or holds) the working folder, which cannot be exchanged; give a sub-folder"
        )


def beside(target: Path) -> Path:
    """A hidden name in the same folder that nobody else has."""
    return target.with_name(f".{target.stem}.{secrets.token_hex(6)}{target.suffix}")


@contextmanager
def _reporting(path: str | os.PathLike[str], error: type[LrcompileError]) -> Iterator[None]:
    try:
        yield
    except OSError as cause:
        raise error(
            f"cannot write {os.fspath(path)!r}: {cause}; what was there before is untouched. "
            "Choose an existing, writable folder with enough free space"
        ) from cause


def _carry_over(old: Path, new: Path, keep: Callable[[str], bool]) -> None:
    for entry in sorted(old.iterdir()):
        if keep(entry.name) and not os.path.lexists(new / entry.name):
            if entry.is_dir() and not entry.is_symlink():
                shutil.copytree(entry, new / entry.name, symlinks=True)
            else:
                shutil.copy2(entry, new / entry.name, follow_symlinks=False)


def _exchange(temporary: Path, target: Path) -> None:
    """Put `temporary` at `target`; what was at `target`, if anything, is then at `temporary`."""
    if not target.exists():
        os.rename(temporary, target)
        return
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        swap = getattr(libc, "renameat2", None)
        if swap is not None:
            names = os.fsencode(temporary), os.fsencode(target)
            if swap(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
                return
    # no exchange in this system or filesystem: two renames, the first undone if the second fails
    aside = beside(target)
    os.rename(target, aside)
    try:
        os.rename(temporary, target)
    except BaseException:
        os.rename(aside, target)
        raise
    os.rename(aside, temporary)


def sync(path: Path) -> None:
    """Return only when the content is on the disk."""
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_folder(path: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened, and renames are journalled
        sync(path)
