"""Inputs and outputs of anything that runs, as flat named tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lrcompile.errors import VerificationError

_CACHE = "past_key_values"

Inputs = dict[str, Any] | tuple[Any, ...]


def input_sets(inputs: Inputs | list[Inputs]) -> list[Inputs]:
    """One or several sets of inputs as a list, every tensor copied so that no run can change what the next one sees."""
    sets = inputs if isinstance(inputs, list) else [inputs]
    if not sets:
        raise VerificationError("inputs is an empty list; give one dict (kwargs) or tuple (args), or a list of them")
    for given in sets:
        if not isinstance(given, dict | tuple):
            raise VerificationError(
                f"inputs must be a dict (kwargs) or a tuple (args), or a list of several, not {type(given).__name__}; "
                "a single tensor x is given as (x,)"
            )
    return [copied(given) for given in sets]


def copied(inputs: Inputs) -> Inputs:
    """The same inputs in fresh tensors, a fresh one for each place even where one object stands in two."""
    return pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, inputs)


def call(function: Any, inputs: Inputs) -> Any:
    return function(**inputs) if isinstance(inputs, dict) else function(*inputs)


def named_tensors(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors among keyword arguments, those in lists and dicts by their place: `past_key_values.0.key`."""
    paths, _ = pytree.tree_flatten_with_path(inputs)
    return {dotted(path): value for path, value in paths if isinstance(value, Tensor)}


def dotted(path: Sequence[Any]) -> str:
    """A place in nested arguments as text."""
    return ".".join(str(getattr(part, "key", getattr(part, "idx", part))) for part in path)


def named_outputs(result: Any) -> dict[str, Tensor]:
    """Every tensor of a model's result in order: `logits`, `past_key_values.keys.0`, `output` for a bare tensor,
    `output.0` and on for a bare tuple. None and text are skipped.
    """
    return {f"output.{name}" if name[0].isdigit() else name: value for name, value in _walk("", result)}


def _walk(prefix: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield prefix or "output", value.detach()
        return
    if value is None or isinstance(value, str):
        return
    if isinstance(value, bool | int | float):
        yield prefix or "output", torch.tensor(value)
        return
    for name, child in _children(value, prefix):
        yield from _walk(f"{prefix}.{name}" if prefix else str(name), child)


def _children(value: Any, prefix: str) -> Sequence[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, list | tuple):
        return list(enumerate(value))
    if type(value) in pytree.SUPPORTED_NODES:
        return list(enumerate(pytree.SUPPORTED_NODES[type(value)].flatten_fn(value)[0]))
    if dataclasses.is_dataclass(value):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    layers = getattr(value, "layers", None)
    if isinstance(layers, list) and all(hasattr(layer, "keys") and hasattr(layer, "values") for layer in layers):
        # a transformers key-value cache, which is a pytree only once transformers' exporters registered it
        return [
            (f"{part}.{index}", getattr(layer, part))
            for part in ("keys", "values")
            for index, layer in enumerate(layers)
        ]
    raise VerificationError(
        f"the output {prefix or 'of the model'} is a {type(value).__name__}, which has no known tensors; "
        "register it with torch.utils._pytree or leave it out with outputs=[...]"
    )


def selected(outputs: dict[str, Tensor], names: Sequence[str] | None, where: str) -> dict[str, Tensor]:
    """The outputs called one of `names`, or lying below one (`past` selects `past.0`); all of them for None."""
    if names is None:
        return outputs
    kept = {
        key: value for key, value in outputs.items() if any(key == name or key.startswith(f"{name}.") for name in names)
    }
    missing = [name for name in names if not any(key == name or key.startswith(f"{name}.") for key in kept)]
    if missing:
        raise VerificationError(f"{where} has no output {', '.join(missing)}; it has {', '.join(outputs) or 'none'}")
    return kept


def aligned(reference: dict[str, Tensor], candidate: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """The candidate's outputs under the reference's names: by name where all agree, else by position.

    A candidate may lack the reference's key-value cache, which no deployed graph returns; the result then lacks it too.
    """
    if set(reference) <= set(candidate):
        return {name: candidate[name] for name in reference}
    lasting = {name: value for name, value in reference.items() if not name.startswith(_CACHE)}
    if lasting and set(lasting) <= set(candidate):
        return {name: candidate[name] for name in lasting}
    for names in (reference, lasting):
        if len(names) == len(candidate):
            return dict(zip(names, candidate.values(), strict=True))
    raise VerificationError(
        f"the reference has {len(reference)} outputs ({', '.join(reference)}) and {where} has {len(candidate)} "
        f"({', '.join(candidate)}); say which to compare with outputs=[...]"
    )
