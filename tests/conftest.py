"""Every test starts from the same seeds, on one thread, offline, and leaves torch's global switches alone."""

from __future__ import annotations

import os

# Before torch, tokenizers, huggingface_hub and triton are imported: each reads its variable once. Interpreted, a Triton
# kernel runs on CPU tensors; tests that compile one start a process without the variable (kernel_tools.compiling).
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", TRITON_INTERPRET="1")

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

SWITCHES: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "gradients enabled": (torch.is_grad_enabled, torch.set_grad_enabled),
    "deterministic algorithms": (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    "threads": (torch.get_num_threads, torch.set_num_threads),
}


def pytest_configure() -> None:
    torch.set_num_threads(1)  # sums add up in one order, and parallel workers do not fight for the cores


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    """Seed every generator; afterwards refuse a switch left on, which would make later tests depend on the order."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    before = {name: get() for name, (get, _) in SWITCHES.items()}
    yield
    left = {name: get() for name, (get, _) in SWITCHES.items() if get() != before[name]}
    for name in left:
        _, put = SWITCHES[name]
        put(before[name])
    assert not left, f"this test left global state changed: {left}"


@pytest.fixture
def nan_when_empty() -> Iterator[None]:
    """torch.empty gives NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def full_disk() -> Iterator[None]:
    """For this process alone: no file grows beyond 1 MiB."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """A command line, in this process: its exit code, and what it printed on either stream."""
    from lrcompile import cli

    def invoke(*arguments: object) -> tuple[int, str, str]:
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as exit:
            code = int(exit.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return invoke
