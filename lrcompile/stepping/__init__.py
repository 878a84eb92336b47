"""`compile_step`: a step of an optimizer as one call, captured as far as the installed torch can."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lrcompile.batches import Batch, Loss, fitted
from lrcompile.errors import AdapterError, SpecError
from lrcompile.stepping.parts import Parts
from lrcompile.stepping.updating import UNTRACEABLE
from lrcompile.stepping.whole import Whole, obstacle
from lrcompile.undisturbed import device_of

__all__ = ["Step", "compile_step"]


def compile_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Loss | None = None,
    *,
    accumulate: int = 1,
    max_norm: float | None = None,
    whole: bool | None = None,
    **options: Any,
) -> Step:
    """θ ← optimizer(θ, ∂L/∂θ), L = loss(model(batch), batch): `step(**batch)` or `step(*batch)` gives L, detached.

    Does what `zero_grad`, forward, `backward` and `optimizer.step` in a loop do, for every method and optimizer: rules
    and hooks around the optimizer's step are called once a step. `loss` gets the model's output and the batch, a dict
    or a tuple; the default is `output.loss`. With `accumulate=k` the mean gradient of k calls makes a step; with
    `max_norm` gradients are first scaled down to that norm, all together. Schedulers are stepped as ever; a new rate
    compiles nothing.

    `step.captured` is "whole" where forward, backward and optimizer are one graph of one `torch.compile`, which takes a
    torch that traces autograd (2.13 can), one of torch's own optimizers, and nothing that Python does between backward
    and step; else "parts": what `lrcompile.compile` gives, its backward pass and the optimizer one after the other.
    `step.reason` says why. A whole step keeps what autograd saves, where the parts' partitioner may compute some of it
    again: 15 % more memory on a small Llama, so `whole=False` asks for parts. The first step of a whole one runs
    eagerly, which shows what trains. On CUDA, both run as CUDA graphs (Inductor's, which keep the guards of
    `torch.compile`), unless `mode` or `options` say otherwise; then a step's gradients lie in memory of the graph until
    the next.

    Further options are those of `lrcompile.compile`. Raises `AdapterError` for an optimizer that holds parameters of
    another model, holds none that trains, or calls closures (LBFGS); `SpecError` for options out of range, a batch the
    model does not take, and a loss that is not one number with a gradient. After an error the gradients are gone and
    the next call begins a step anew.
    """
    _check(model, optimizer, loss, accumulate, max_norm)
    if device_of(model).type == "cuda" and not {"mode", "options"} & options.keys():
        options["mode"] = "reduce-overhead"
    reason = "whole=False" if whole is False else obstacle(model, optimizer, accumulate, options)
    if whole and reason:
        raise SpecError(f"the step cannot be captured whole: {reason}; whole=None takes what can be had", field="whole")
    return Step(model, optimizer, loss, accumulate, max_norm, reason, options)


class Step:
    """What `compile_step` returns."""

    captured: str
    """"whole" or "parts"."""
    reason: str
    """Why it is not whole; empty if it is."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Loss | None,
        accumulate: int,
        max_norm: float | None,
        reason: str,
        options: dict[str, Any],
    ):
        self.model, self.optimizer = model, optimizer
        self.captured, self.reason = ("parts" if reason else "whole"), reason
        self._parts = Parts(model, optimizer, loss, accumulate, max_norm, options)
        self._whole = None if reason else Whole(model, optimizer, loss, max_norm, options)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """L of the batch, 0-d, detached; the model's parameters are then those after the step."""
        batch = self._fitted(args, kwargs)
        if self._whole is None:
            return self._parts(batch)
        if not self._whole.ready:
            value = self._parts.eagerly(batch)
            if reason := self._whole.prepare():
                self._by_parts(reason)
            return value
        if reason := self._whole.changed():
            self._by_parts(reason)
            return self._parts(batch)
        try:
            return self._whole(batch)
        except UNTRACEABLE as error:
            value = self._parts(batch)  # raises where the batch is at fault; then the step stays whole
            self._by_parts(f"torch cannot trace it ({type(error).__name__}: {_first_line(error)})")
            return value

    def __repr__(self) -> str:
        name = type(self.optimizer).__name__
        if self.captured == "whole":
            return f"Step(whole: forward, backward and {name} are one graph)"
        return f"Step(parts: compiled forward and backward, then {name}; not whole: {self.reason})"

    def _by_parts(self, reason: str) -> None:
        self._whole, self.captured, self.reason = None, "parts", reason

    def _fitted(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch:
        """The batch on the model's device."""
        if args and kwargs:
            raise SpecError(
                "a batch is a dict, step(**batch), or a tuple, step(*batch); got values of both", field="batch"
            )
        if len(args) == 1 and isinstance(args[0], (Mapping, list, tuple)):
            star = "**" if isinstance(args[0], Mapping) else "*"
            raise SpecError(
                f"step takes what the model takes, and got a single {type(args[0]).__name__}: unpack the batch,"
                f" step({star}batch)",
                field="batch",
            )
        if not args and not kwargs:
            raise SpecError("step takes a batch, step(**batch) or step(*batch), and got nothing", field="batch")
        return fitted(self.model, kwargs or args, 0)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _check(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: Loss | None, accumulate: int, max_norm: float | None
) -> None:
    if not isinstance(model, nn.Module):
        raise AdapterError(f"compile_step takes a model, got a {type(model).__name__}")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise AdapterError(
            f"compile_step takes an optimizer, such as lrcompile.optimizer(model, torch.optim.AdamW, lr=…), got"
            f" {optimizer!r}"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise AdapterError("LBFGS evaluates the model many times a step, through a closure; step it in a plain loop")
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    own = {id(parameter) for parameter in model.parameters()}
    foreign = sum(id(parameter) not in own for parameter in held)
    if foreign:
        raise AdapterError(
            f"{foreign} of the {len(held)} parameters of this optimizer belong to another model (or to this one before"
            " it was changed); make one with lrcompile.optimizer(model, cls, lr)"
        )
    if not any(parameter.requires_grad for parameter in held):
        raise AdapterError(
            "nothing that this optimizer holds trains; call lrcompile.activate(model, name, train=name) before"
        )
    if loss is not None and not callable(loss):
        raise SpecError(f"loss is a function of output and batch, got {loss!r}", field="loss")
    if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
        raise SpecError(f"accumulate is {accumulate!r}; expected a whole number from 1", field="accumulate")
    if max_norm is not None and not (isinstance(max_norm, (int, float)) and max_norm > 0):
        raise SpecError(f"max_norm is {max_norm!r}; expected a number above 0, or None", field="max_norm")
