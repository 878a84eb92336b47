"""A user's data: batches taken from any iterable, the model run on them, and the loss of what comes out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lrcompile.errors import AdapterError, LrcompileError, SpecError
from lrcompile.hosting import original_class
from lrcompile.progress import shown
from lrcompile.undisturbed import device_of

Loss = Callable[[Any, Any], Any]
Batch = dict[str, Any] | tuple[Any, ...]

UNFIT = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)
"""What a model raises when it cannot take its inputs."""


def taken(data: Iterable[Any], most: int | None, label: str) -> Iterator[Any]:
    """At most `most` batches of `data` (None: all); no more than that are drawn. `SpecError` where there is none."""
    if isinstance(data, (Mapping, Tensor, str)) or not isinstance(data, Iterable):
        raise SpecError(
            f"data is an iterable of batches (a list, a DataLoader, a generator), got a {type(data).__name__}; put a"
            " single batch into a list: data=[batch]",
            field="data",
        )
    empty = True
    for batch in shown(islice(data, most), label, most):
        empty = False
        yield batch
    if empty:
        raise SpecError(
            "data holds no batch; give at least one (a generator that was read before is empty)", field="data"
        )


def fitted(model: nn.Module, batch: Any, index: int) -> Batch:
    """The batch as a dict or tuple on the model's device; `SpecError` where it is neither, or not what the model takes.

    Mappings like `BatchEncoding` count as dicts, a list as a tuple: `default_collate` makes lists of tuples.
    """
    device = device_of(model)
    to_device = lambda given: pytree.tree_map_only(Tensor, lambda t: t.to(device), given)  # noqa: E731
    if isinstance(batch, Mapping) and all(isinstance(key, str) for key in batch):
        args, kwargs = (), {key: to_device(value) for key, value in batch.items()}
    elif isinstance(batch, (tuple, list)):
        args, kwargs = tuple(map(to_device, batch)), {}
    else:
        raise SpecError(
            f"batch {index} of data is a {type(batch).__name__}; a batch is a dict, for model(**batch), or a tuple, for"
            " model(*batch)",
            field="data",
        )
    signature = _signature(model)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        has = ", ".join(map(repr, kwargs)) if kwargs else f"{len(args)} positional values"
        raise SpecError(
            f"{original_class(model).__name__} does not take batch {index} of data, which has {has} ({error}); its"
            f" forward takes {', '.join(signature.parameters) or 'nothing'}",
            field="data",
        ) from error
    return kwargs or args


def run(model: nn.Module, batch: Batch, index: int) -> Any:
    """model(batch); an `AdapterError` where that fails."""
    try:
        return model(**batch) if isinstance(batch, dict) else model(*batch)
    except (torch.OutOfMemoryError, LrcompileError):
        raise
    except UNFIT as error:
        raise AdapterError(
            f"{original_class(model).__name__} cannot be run on batch {index} of data ({type(error).__name__}: {error})"
        ) from error


def loss_of(output: Any, batch: Batch, loss: Loss | None) -> Tensor:
    """loss(output, batch), by default `output.loss`: a scalar that requires a gradient, or a `SpecError`."""
    if loss is not None:
        value, what = loss(output, batch), "loss(output, batch)"
    else:
        value = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        what = "output.loss"
    if value is None and loss is None:
        raise SpecError(
            f"the model's output (a {type(output).__name__}) has no loss; put labels into the batch of a model that"
            " makes one of them, or pass loss=lambda output, batch: …",
            field="loss",
        )
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise SpecError(f"{what} must be one number, a tensor of one element, got {got}", field="loss")
    if not value.requires_grad:
        raise SpecError(
            f"{what} does not depend on any adapted weight: it carries no gradient (detached, .item(), computed under"
            " no_grad, or not of this model's output)",
            field="loss",
        )
    return value.reshape(())


def _signature(model: nn.Module) -> inspect.Signature:
    replaced = model.__dict__.get("forward")
    return inspect.signature(replaced or MethodType(original_class(model).forward, model))
