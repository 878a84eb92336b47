"""What an ONNX Runtime session is opened with and given, and what becomes of its complaints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lrcompile.errors import VerificationError, require
from lrcompile.verifying.outputs import Inputs, named_tensors

LEVELS = {
    "disabled": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
# By default int4 graphs are lowered to int8 activations: 7e-3 instead of 1e-6.
_CONFIG = {"session.qdq_matmulnbits_accuracy_level": "0"}


def settings_of(session: Mapping[str, Any]) -> dict[str, Any]:
    known = {"threads", "graph_optimization_level", "config"}
    if not set(session) <= known:
        raise VerificationError(f"unknown session settings {sorted(set(session) - known)}; known are {sorted(known)}")
    level, threads = session.get("graph_optimization_level", "all"), session.get("threads", torch.get_num_threads())
    config = {**_CONFIG, **session.get("config", {})}
    if level not in LEVELS or type(threads) is not int or not 1 <= threads <= 1024:
        raise VerificationError(
            f"session settings {dict(session)}: a level of {', '.join(LEVELS)} and 1 to 1024 threads are possible"
        )
    if not set(config) <= set(_CONFIG) or not all(isinstance(value, str) for value in config.values()):
        raise VerificationError(
            f"unknown session config entries {sorted(set(config) - set(_CONFIG))}; known are {sorted(_CONFIG)}"
        )
    return {"threads": threads, "graph_optimization_level": level, "config": config}


class typed:
    """Whatever ONNX Runtime raises becomes a `VerificationError` with its text."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (*_runtime_errors(), ValueError, RuntimeError)):
            raise VerificationError(f"ONNX Runtime cannot run {self.path}: {error}") from error


def _runtime_errors() -> tuple[type[Exception], ...]:
    state = require("onnxruntime.capi.onnxruntime_pybind11_state", "onnx")
    return tuple(value for value in vars(state).values() if isinstance(value, type) and issubclass(value, Exception))


def feed_of(path: Path, session: Any, inputs: Inputs, by_name: bool) -> dict[str, Any]:
    """Inputs by name where they have the graph's names, else, unless they have to, the tensors in order."""
    names = [entry.name for entry in session.get_inputs()]
    leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    named = named_tensors(inputs) if isinstance(inputs, dict) else {}
    if named and len(named) == len(leaves) and set(named) == set(names):
        given = named
    elif len(leaves) == len(names) and not set(named) & set(names) and not (by_name and named):
        given = dict(zip(names, leaves, strict=True))
    else:
        offered = ", ".join(named) or f"{len(leaves)} tensors"
        raise VerificationError(f"{path} takes the inputs {', '.join(names)}; given were {offered}")
    unusual = [name for name, value in given.items() if value.dtype == torch.bfloat16]
    if unusual:
        raise VerificationError(
            f"{path}: bfloat16 inputs ({', '.join(unusual)}) cannot be handed to ONNX Runtime; export with float32"
        )
    return {name: value.detach().cpu().contiguous().numpy() for name, value in given.items()}
