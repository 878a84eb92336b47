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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

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

Way = Callable[..., Any]
"""One of several functions that compute the same from the same arguments."""
Timer = Callable[[Callable[[], object]], float]


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
        self._chosen: dict[ShapeClass, Way] = {}
        # Reentrant: a way may itself be a choice among others.
        self._measuring = threading.RLock()

    def choose(self, shape_class: ShapeClass, ways: Callable[[], Mapping[str, Way]], arguments: Sequence[Any]) -> Way:
        """The fastest of `ways()`, by name, on noise in the place of `arguments`; asked for only where none is kept.

        The first is the fallback, which runs where nothing else is faster by `MARGIN`. A stored name that is none of
        `ways` (of another version) is measured anew. While a CUDA graph is recorded, and where the device's memory does
        not hold the noise, nothing can be measured and nothing is stored: the fallback runs.
        """
        chosen = self._chosen.get(shape_class)
        if chosen is not None:
            return chosen
        named = ways()
        fallback = next(iter(named))
        name = fallback if len(named) == 1 else self._stored.get(str(shape_class), "")
        if name in named:
            return self._chosen.setdefault(shape_class, named[name])
        if self._timer is None:
            return self._chosen.setdefault(shape_class, named[fallback])
        if _recording():
            return named[fallback]
        with self._measuring:
            if shape_class not in self._chosen:
                self._chosen[shape_class] = named[self._measured(shape_class, named, arguments, self._timer)]
        return self._chosen[shape_class]

    def _measured(
        self, shape_class: ShapeClass, named: Mapping[str, Way], arguments: Sequence[Any], timer: Timer
    ) -> str:
        try:
            name = _fastest(shape_class, named, arguments, timer)
        except torch.OutOfMemoryError:
            return next(iter(named))
        self._store(str(shape_class), name)
        return name

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


def _fastest(shape_class: ShapeClass, ways: Mapping[str, Way], arguments: Sequence[Any], timer: Timer) -> str:
    fallback, *others = ways
    noise = noise_like(arguments)
    expected = ways[fallback](*noise)
    times = {fallback: timer(functools.partial(ways[fallback], *noise)) * (1 - MARGIN)}
    for name in others:
        run = functools.partial(ways[name], *noise)
        try:
            times[name] = timer(run)
        except Unfit:
            continue
        # Compilers, drivers and devices differ: what computes something else here is not to be had at any speed.
        if not alike(run(), expected):
            del times[name]
            warnings.warn(
                f"{shape_class}: {name!r} computes something else than {fallback!r} on this device and is not used;"
                " please report it, with the versions of torch, triton and the driver",
                stacklevel=2,
            )
    return min(times, key=times.__getitem__)


def alike(value: Any, expected: Any) -> bool:
    """Whether two results differ by no more than the rounding of two orders of summation, as a share of the largest.

    Four units of roundoff in 16 bits, and 2⁻¹⁰ in float32, whose products may be rounded to TF32: what is wrong by a
    tile or a term is wrong by far more.
    """
    if isinstance(expected, (list, tuple)):
        return all(alike(ours, theirs) for ours, theirs in zip(value, expected, strict=True))
    if not expected.is_floating_point():
        return torch.equal(value, expected)
    share = max(4 * torch.finfo(expected.dtype).eps / 2, 2**-10)
    ours, theirs = value.float(), expected.float()
    return bool(((ours - theirs).abs().amax() <= share * theirs.abs().amax()).item())


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


def milliseconds(run: Callable[[], object]) -> float:
    """Median time of one call on the current CUDA device, its L2 cache cleared before each."""
    require("triton", "gpu")
    from triton.runtime.errors import OutOfResources, PTXASError
    from triton.testing import do_bench

    try:
        return do_bench(run, warmup=10, rep=50, return_mode="median")
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


def noise_like(value: Any) -> Any:
    """Noise in the shape, dtype and storage order of every tensor in `value`, integers of any size; the rest as it is.

    Zeros, which fresh factors are, would be timed too fast: a GPU draws less power on them and clocks higher. The
    user's generators are left alone.
    """
    if isinstance(value, (list, tuple)):
        return [noise_like(inner) for inner in value]
    if not isinstance(value, Tensor):
        return value
    generator = torch.Generator(value.device).manual_seed(0)
    noise = torch.empty_like(value)
    return noise.normal_(generator=generator) if value.is_floating_point() else noise.random_(generator=generator)


def run_fastest(shape_class: ShapeClass, ways: Callable[[], Mapping[str, Way]], *arguments: Any) -> Any:
    """What the fastest of `ways()` returns for `arguments`, on the device of the first tensor among them."""
    # Triton launches on the current device, whatever device its tensors are on.
    with torch.cuda.device_of(next(_tensors(arguments))):
        return tuner().choose(shape_class, ways, arguments)(*arguments)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors(inner)
