"""How far a step's numbers are from the intended mathematics."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lrcompile.errors import VerificationError
from lrcompile.verifying.float64 import float64_copy, float64_mode


def errors(call: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor, w: Tensor) -> dict[str, float]:
    """Of the output (y), the input's gradient (dx) and the worst gradient of a trained tensor (trained), the largest as
    a share of the largest value there. Against a float64 copy whose norms and softmax compute in float64 too, whatever
    the model says; nothing where there is none, since another library's codes cannot be widened.
    """
    if not all(p.is_floating_point() for p in model.parameters()):  # codes of bitsandbytes; ours are buffers
        return {}
    found = _results(call, model, x, w)
    try:
        exact = float64_copy(model)
        with float64_mode(), torch.enable_grad():
            truth = _results(exact, exact, x.detach().double().requires_grad_(True), w.double())
    except (RuntimeError, TypeError, NotImplementedError, VerificationError):
        return {}
    shares = {name: _largest(found[name] - other) / _largest(other) for name, other in truth.items() if other.any()}
    trained = [share for name, share in shares.items() if name not in ("y", "dx")]
    return {"y": shares["y"], "dx": shares["dx"]} | ({"trained": max(trained)} if trained else {})


def _results(call: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor, w: Tensor) -> dict[str, Tensor]:
    """The output and every gradient, by name."""
    inputs = {"dx": x} | {name: p for name, p in model.named_parameters() if p.requires_grad}
    y = call(x)
    gradients = torch.autograd.grad((y * w).sum(), list(inputs.values()))
    return {"y": y.detach(), **dict(zip(inputs, gradients, strict=True))}


def _largest(values: Tensor) -> float:
    return float(values.abs().max())
