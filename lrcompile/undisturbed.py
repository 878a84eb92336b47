"""Looking at a model at work without leaving a trace in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from lrcompile.coded import is_coded


@contextmanager
def undisturbed(model: nn.Module, seed: int | None = None) -> Iterator[None]:
    """Modes, gradients, `requires_grad`, buffers and random state are afterwards what they were, whatever happens.

    Within the block no parameter has a gradient at first. With a `seed`, torch's generators start from it.
    """
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    # codes are as large as the model and nothing writes them
    buffers = [(module, name, buffer, buffer.clone()) for module in model.modules()
               if not is_coded(module)
               for name, buffer in module._buffers.items() if buffer is not None]  # fmt: skip
    with torch.random.fork_rng(devices=_cuda_devices(model)):
        if seed is not None:
            torch.manual_seed(seed)
        try:
            for parameter, _, _ in parameters:
                parameter.grad = None
            yield
        finally:
            with torch.no_grad():
                for module, name, buffer, value in buffers:
                    module._buffers[name] = buffer.copy_(value)
            for parameter, flag, gradient in parameters:
                parameter.requires_grad_(flag)
                parameter.grad = gradient
            for module, mode in modes:
                module.training = mode


def set_mode(model: nn.Module, training: bool) -> None:
    """`model.train(training)`, where that can be set: an exported program's was fixed when it was captured."""
    try:
        model.train(training)
    except NotImplementedError:
        return


def device_of(model: nn.Module) -> torch.device:
    """Where its inputs go: the device of its first parameter."""
    tensors = chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


RandomState = tuple[Tensor, list[Tensor]]


def random_state() -> RandomState:
    """Of torch's generators: the host's, and those of all devices in use."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def set_random_state(state: RandomState) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])


def _cuda_devices(model: nn.Module) -> list[int]:
    tensors = chain(model.parameters(), model.buffers())
    return sorted({t.device.index for t in tensors if t.device.type == "cuda" and t.device.index is not None})
