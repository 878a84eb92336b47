"""choice(shape class) = argmin over the ways to compute it of the measured time; measured once, then kept.

Whether a Triton kernel beats cuBLAS, and in which configuration, is a property of device and shape that no model
predicts well enough. So the first call of a shape class times every way on random data; the winner is kept in memory
and in a file of the user's cache folder, for the next process.

`LRCOMPILE_CACHE` names the folder (else `$XDG_CACHE_HOME/lrcompile`, else `~/.cache/lrcompile`); `LRCOMPILE_TUNE=0`
measures nothing and runs what was chosen before, or the fallback.
"""

from __future__ import annotations

import functools
import json
import os
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lrcompile.errors import LrcompileError, require
from lrcompile.kernel_tools.shapes import ShapeClass
from lrcompile.writing import atomic_file

SCHEMA = 1
MARGIN = 0.02
"""How much faster than the fallback another way must be: less is noise, and the fallback needs no compiler."""
LARGEST_FILE = 1 << 22
"""Bytes of a file of choices that are read; some ten thousand shape classes."""

Way = Callable[[], object]
Timer = Callable[[Way], float]


class Unfit(LrcompileError):
    """A way that this device cannot run (too little shared memory, say): the tuner passes it over."""


class Tuner:
    """The fastest way for each shape class, measured with `timer`, kept in memory and in the JSON file `path`.

    The file is a hint and never trusted: one that cannot be read or has another form is as if it were absent, and is
    replaced after the next measurement. Without `path` choices stay in memory; without `timer` nothing is measured.
    """

    def __init__(self, path: Path | None, timer: Timer | None):
        self._path = path
        self._timer = timer
        self._stored = {} if path is None else _read(path)
        self._chosen: dict[ShapeClass, str] = {}
        self._measuring = threading.Lock()

    def choose(self, shape_class: ShapeClass, names: Sequence[str], prepare: Callable[[], Mapping[str, Way]]) -> str:
        """The name of the fastest of the ways `prepare()` makes, one for each of `names`.

        `names[0]` is the fallback, which runs where nothing else is faster by `MARGIN`. `prepare` is called only to
        measure: it makes random data. A stored name that is none of `names` (of another version) is measured anew.
        Nothing is measured while a CUDA graph is recorded: the fallback is recorded then, unless a choice exists.
        """
        chosen = self._chosen.get(shape_class) or self._stored.get(str(shape_class))
        if chosen is not None and chosen in names:
            self._chosen[shape_class] = chosen
            return chosen
        if self._timer is None or _recording():
            return names[0]
        with self._measuring:
            if shape_class not in self._chosen:
                self._chosen[shape_class] = _fastest(prepare(), names, self._timer)
                self._store(str(shape_class), self._chosen[shape_class])
        return self._chosen[shape_class]

    def _store(self, key: str, name: str) -> None:
        if self._path is None:
            return
        # Read again: another process may have added its own. The last writer wins; a lost entry costs a measurement.
        self._stored = {**_read(self._path), key: name}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(self._path) as file:
                file.write_text(json.dumps({"schema": SCHEMA, "choices": self._stored}, indent=1, sort_keys=True))
        except (OSError, LrcompileError) as error:
            self._path = None
            warnings.warn(
                f"choices of kernels cannot be kept, so every process will measure again ({error}); set"
                " LRCOMPILE_CACHE to a writable folder, or LRCOMPILE_TUNE=0 to measure nothing",
                stacklevel=2,
            )


def _fastest(ways: Mapping[str, Way], names: Sequence[str], timer: Timer) -> str:
    fallback, *others = names
    times = {fallback: timer(ways[fallback]) * (1 - MARGIN)}
    for name in others:
        try:
            times[name] = timer(ways[name])
        except Unfit:
            continue
    return min(times, key=times.__getitem__)


def _recording() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _read(path: Path) -> dict[str, str]:
    try:
        if path.stat().st_size > LARGEST_FILE:
            return {}
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        return {}
    choices = content.get("choices")
    if not isinstance(choices, dict) or not all(isinstance(name, str) for name in choices.values()):
        return {}
    return choices


def milliseconds(way: Way) -> float:
    """Median time of one call on the current CUDA device, its L2 cache cleared before each."""
    require("triton", "gpu")
    from triton.runtime.errors import OutOfResources, PTXASError
    from triton.testing import do_bench

    try:
        return do_bench(way, warmup=10, rep=50, return_mode="median")
    except (OutOfResources, PTXASError) as error:
        raise Unfit(str(error)) from error


@functools.cache
def tuner() -> Tuner:
    """The one of this process; the environment is read when it is first asked for."""
    return Tuner(folder() / "kernels.json", None if os.environ.get("LRCOMPILE_TUNE") == "0" else milliseconds)


def folder() -> Path:
    """Where choices outlive the process."""
    given = os.environ.get("LRCOMPILE_CACHE")
    if given:
        return Path(given)
    shared = os.environ.get("XDG_CACHE_HOME", "")
    # A relative XDG_CACHE_HOME is to be ignored, says the specification of those folders.
    return (Path(shared) if os.path.isabs(shared) else Path.home() / ".cache") / "lrcompile"


def random_like(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Noise in the same shapes, dtypes and storage orders, integers of any size; the user's generators are left alone.

    Zeros, which fresh factors are, would be timed too fast: a GPU draws less power on them and clocks higher.
    """
    generator = torch.Generator(tensors[0].device).manual_seed(0)
    fresh = [torch.empty_like(tensor) for tensor in tensors]
    for tensor in fresh:
        tensor.normal_(generator=generator) if tensor.is_floating_point() else tensor.random_(generator=generator)
    return fresh
