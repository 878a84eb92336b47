"""Values computed from tensors, kept as long as none of them may have changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

_steps = 0


def count_step(*_: Any) -> None:
    """Say that tensors that train may have been written where nobody sees it, as a replayed CUDA graph does."""
    global _steps
    _steps += 1


register_optimizer_step_post_hook(count_step)


class State(NamedTuple):
    """Equal for the same state of the same tensor, as long as `hold` keeps its storage's address from being reused."""

    storage: int
    offset: int | torch.SymInt
    version: int
    dtype: torch.dtype
    steps: int


def states_of(tensors: Sequence[Tensor]) -> tuple[State, ...] | None:
    """What tells when one of `tensors` may have changed; None where that cannot be told.

    A tensor may have changed if it has another storage or another version, and one that trains if any optimizer of this
    process has taken a step: some write through `.data` or their own kernels, which no version counter sees. So a write
    through `.data` outside an optimizer goes unnoticed; write with `tensor.copy_` under `torch.no_grad()`.
    """
    if any(tensor.is_inference() or is_functorch_wrapped_tensor(tensor) for tensor in tensors):
        return None  # the one counts no versions, the other is a view into a transform
    if any(tensor.is_cuda for tensor in tensors) and torch.cuda.is_current_stream_capturing():
        return None  # replayed, it has to be computed from what the tensors hold then
    return tuple(
        State(
            t.untyped_storage()._cdata, t.storage_offset(), t._version, t.dtype, _steps if t.requires_grad else -1
        ) for t in tensors
    )  # fmt: skip


def hold(tensors: Sequence[Tensor]) -> tuple[StorageWeakRef, ...]:
    """As long as these live, no other storage gets the address of one of `tensors`'; the memory itself is not kept."""
    return tuple(StorageWeakRef(tensor.untyped_storage()) for tensor in tensors)


def constant(compute: Callable[[], Tensor]) -> Tensor:
    """compute(), an ordinary tensor without history even in inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        return compute()


class Cached:
    """A function of tensors that needs no gradient, computed once for each of their states. A copy starts empty."""

    def __init__(self) -> None:
        self._states: tuple[State, ...] | None = None
        self._held: tuple[StorageWeakRef, ...] = ()
        self._value: Tensor | None = None

    def get(self, tensors: Sequence[Tensor], compute: Callable[[], Tensor]) -> Tensor:
        """compute(), a function of `tensors` alone; an ordinary tensor even in inference mode."""
        states = states_of(tensors)
        if states is not None and states == self._states and self._value is not None:
            return self._value
        value = constant(compute)
        if states is None:
            self._states, self._held, self._value = None, (), None
        else:
            self._states, self._held, self._value = states, hold(tensors), value
        return value

    def __reduce__(self) -> tuple[Any, ...]:
        return (Cached, ())
