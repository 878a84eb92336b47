"""CUDA's way through the kernels on tensors of a CPU."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest

from lrcompile.kernel_tools import tuning
from lrcompile.kernel_tools.tuning import Tuner


def pretend_hopper(monkeypatch: pytest.MonkeyPatch, *ops: ModuleType) -> list[object]:
    """What these modules measure from now on, all of it run, with kernels interpreted.

    Each is faster than the one before, so the last way wins.
    """
    measured: list[object] = []

    def timer(run: Callable[[], object]) -> float:
        run()
        measured.append(run)
        return -float(len(measured))

    chooser = Tuner(None, timer)
    for module in ops:
        monkeypatch.setattr(module, "capability", lambda device: 90)
    monkeypatch.setattr(tuning, "tuner", lambda: chooser)
    return measured
