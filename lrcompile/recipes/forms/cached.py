"""A value computed from tensors, kept as long as none of them may have changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

_steps = 0


def _count(*_: Any) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count)


class Cached:
    """A function of tensors that need no gradient, computed once for each of their states.

    A tensor may have changed if it has another storage or another version, and one that trains if any optimizer of this
    process has taken a step: some write through `.data` or their own kernels, which no version counter sees. So a write
    through `.data` outside an optimizer goes unnoticed; write with `tensor.copy_` under `torch.no_grad()`. A copy
    starts empty.
    """

    def __init__(self) -> None:
        self._stamp: tuple[Any, ...] | None = None
        self._value: Tensor | None = None

    def get(self, tensors: Sequence[Tensor], compute: Callable[[], Tensor]) -> Tensor:
        """compute(), a function of `tensors` alone; its result is an ordinary tensor even in inference mode."""
        stamp = _stamp(tensors)
        if stamp is not None and stamp == self._stamp and self._value is not None:
            return self._value
        with torch.inference_mode(False), torch.no_grad():
            value = compute()
        self._stamp, self._value = (stamp, value) if stamp is not None else (None, None)
        return value

    def __reduce__(self) -> tuple[Any, ...]:
        return (Cached, ())


def _stamp(tensors: Sequence[Tensor]) -> tuple[Any, ...] | None:
    """Equal for the same state of the same tensors; None where that cannot be told.

    The weak reference keeps a freed storage's address from being given to another one, but not its memory.
    """
    if any(tensor.is_inference() or is_functorch_wrapped_tensor(tensor) for tensor in tensors):
        return None  # the one counts no versions, the other is a view into a transform
    states = ((StorageWeakRef(t.untyped_storage()), t.storage_offset(), t._version, t.dtype, t.device) for t in tensors)
    return (_steps if any(tensor.requires_grad for tensor in tensors) else None, *states)
