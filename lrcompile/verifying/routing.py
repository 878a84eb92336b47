"""Choices of experts: compared exactly, and held fixed while the rest is measured.

A router takes the k largest of its scores. Where two are nearly equal, rounding decides, and a token that goes to
another expert gives another output: no error of arithmetic, but larger than any. So float64 and its replays take the
experts the reference takes in its own dtype (D is then rounding alone), a candidate's outputs are measured against
float64 at the candidate's own choices, and the choices themselves are compared as sets, where the reference's and
float64's are both right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lrcompile.verifying.outputs import Inputs, call, copied
from lrcompile.verifying.runners import evaluating
from lrcompile.verifying.verdict import OutputRow

_TOPK = torch.ops.aten.topk.default


class _Record(TorchDispatchMode):
    def __init__(self, found: list[Tensor]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is _TOPK:
            self.found.append(result[1].detach().clone())
        return result


class _Force(TorchDispatchMode):
    def __init__(self, choices: Sequence[Tensor]):
        super().__init__()
        self.left = iter(choices)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is not _TOPK:
            return result
        indices = next(self.left, None)
        if indices is None or indices.shape != result[1].shape:
            return result
        dim = args[2] if len(args) > 2 else (kwargs or {}).get("dim", -1)
        return torch.gather(args[0], dim, indices), indices.clone()


@contextmanager
def recording(found: list[Tensor]) -> Iterator[None]:
    """Inside, the indices of every top-k are added to `found`, in order."""
    with _Record(found):
        yield


@contextmanager
def forcing(choices: Sequence[Tensor]) -> Iterator[None]:
    """Inside, the n-th top-k takes the n-th of `choices`."""
    with _Force(choices):
        yield


def choices_of(module: nn.Module, inputs: Inputs) -> list[Tensor]:
    """What the routers of a module or graph choose on these inputs."""
    found: list[Tensor] = []
    with evaluating(module), torch.no_grad(), recording(found):
        call(getattr(module, "_orig_mod", module), copied(inputs))
    return found


def compare_choices(
    theirs: Sequence[Tensor], own: Sequence[Tensor], free: Sequence[Tensor]
) -> tuple[list[OutputRow], list[str]]:
    """A row for each router, and a sentence for each that takes experts neither the reference nor float64 takes."""
    rows, failures = [], []
    for index, (mine, eager, exact) in enumerate(zip(theirs, own, free, strict=True)):
        name = f"router {index}"
        right = _same(mine, eager) | _same(mine, exact)
        wrong = int((~right).sum())
        rows.append(OutputRow(name, tuple(mine.shape), mismatches=wrong))
        if wrong:
            failures.append(f"{name}: {wrong} of {right.numel()} tokens go to other experts")
    return rows, failures


def _same(one: Tensor, other: Tensor) -> Tensor:
    """For each row: the same set. In which order equal scores stand makes no difference to their sum."""
    return (one.cpu().sort(-1).values == other.cpu().sort(-1).values).all(-1)
