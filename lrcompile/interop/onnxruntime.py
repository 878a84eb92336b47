"""Run a checked ONNX file in ONNX Runtime on the CPU, under settings that are pinned and recorded."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lrcompile.errors import AdapterError, VerificationError, require
from lrcompile.interop.onnx_adapters import Interface, names_of
from lrcompile.interop.onnx_safety import check
from lrcompile.verifying.outputs import Inputs, named_tensors
from lrcompile.verifying.provenance import Step, scope_values

if TYPE_CHECKING:
    import onnx

    from lrcompile.verifying.runners import Layers

_LEVELS = {
    "disabled": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
# By default int4 graphs are lowered to int8 activations: 7e-3 instead of 1e-6.
_CONFIG = {"session.qdq_matmulnbits_accuracy_level": "0"}
_FOLDER = "session.model_external_initializers_file_folder_path"
_SCOPES = "pkg.torch.onnx.name_scopes"


class OnnxRunner:
    """One session over a file; `session` may set `threads`, `graph_optimization_level` and `config` entries.

    `interface` says which adapters there are where the file takes them as inputs, `active` which of them act. With
    `by_name` a dict of inputs has to have the graph's names; a model's arguments may be called otherwise.
    """

    def __init__(
        self,
        path: Path,
        session: Mapping[str, Any] | None = None,
        interface: Interface | None = None,
        active: tuple[str, ...] = (),
        by_name: bool = False,
    ):
        self.label = path.name
        self._interface = interface
        self._loaded: dict[tuple[str, ...], list[Any]] = {}
        self.active, self._by_name = active, by_name
        self._path = path
        self._settings = _settings(session or {})
        self._model = check(path)
        self._adapters(active)
        self._session = self._open(self._model)

    @property
    def session(self) -> dict[str, Any]:
        version = require("onnxruntime", "onnx").__version__
        settings = {"runtime": f"onnxruntime {version}", "provider": "CPUExecutionProvider", **self._settings}
        return settings if self._interface is None else {**settings, "adapters": list(self.active)}

    def steps(
        self, empty: Layers, adapters: str | Iterable[str] | None = None
    ) -> Callable[[dict[str, Tensor]], Tensor]:
        """See `onnx_steps.steps`; `adapters` as for `run`."""
        from lrcompile.interop.onnx_steps import steps

        options = self._options(self.active if adapters is None else names_of(adapters))
        with _typed(self._path):
            step = steps(self._session, empty, options)

        def typed(given: dict[str, Tensor]) -> Tensor:
            with _typed(self._path):
                return step(given)

        return typed

    @property
    def adapters(self) -> tuple[str, ...]:
        """Those there are."""
        return tuple(self._interface.files) if self._interface is not None else ()

    def run(self, inputs: Inputs, adapters: str | Iterable[str] | None = None) -> dict[str, Tensor]:
        """The outputs by name. `adapters`: one or several that act in this run, () for none; None: those `active`."""
        active = self.active if adapters is None else names_of(adapters)
        inputs = pytree.tree_map(lambda each: torch.from_numpy(each) if isinstance(each, np.ndarray) else each, inputs)
        return self._run(self._session, [output.name for output in self._model.graph.output], inputs, active)

    def intermediates(self, inputs: Inputs, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """The values of the reference's places, all from one run of one session in which they are marked as outputs."""
        from lrcompile.verifying.intermediates import matched

        leaving = _scopes(self._model.graph)
        floats = _floating(self._model)
        wanted = list(dict.fromkeys(name for scope in shapes for name in leaving.get(scope, ()) if name in floats))
        onnx = require("onnx", "onnx")
        marked = onnx.ModelProto()
        marked.CopyFrom(self._model)
        present = {output.name for output in marked.graph.output}
        marked.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted if name not in present)
        return matched(leaving, self._run(self._open(marked), wanted, inputs, self.active), shapes) if wanted else {}

    def _open(self, model: onnx.ModelProto) -> Any:
        ort = require("onnxruntime", "onnx")
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._settings["threads"]
        options.inter_op_num_threads = 1
        options.graph_optimization_level = getattr(
            ort.GraphOptimizationLevel, _LEVELS[self._settings["graph_optimization_level"]]
        )
        options.log_severity_level = 3
        for key, value in self._settings["config"].items():
            options.add_session_config_entry(key, value)
        # The bytes that were checked are the ones that run; external data is looked up in the same folder.
        options.add_session_config_entry(_FOLDER, str(self._path.resolve().parent))
        with _typed(self._path):
            return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def _adapters(self, names: tuple[str, ...]) -> list[Any]:
        if names and self._interface is None:
            raise AdapterError(f"{self._path} takes no adapters; export it with adapters='inputs'")
        if names not in self._loaded:
            self._loaded[names] = self._interface.load(names) if self._interface is not None else []
        return self._loaded[names]

    def _run(self, session: Any, names: list[str], inputs: Inputs, active: tuple[str, ...]) -> dict[str, Tensor]:
        feed = _feed(self._path, session, inputs, self._by_name)
        options = self._options(active)
        with _typed(self._path):
            values = session.run(names, feed, options)
        return {name: torch.from_numpy(value.copy()) for name, value in zip(names, values, strict=True)}

    def _options(self, active: tuple[str, ...]) -> Any:
        options = require("onnxruntime", "onnx").RunOptions()
        for adapter in self._adapters(active):
            options.add_active_adapter(adapter)
        return options


def _settings(session: Mapping[str, Any]) -> dict[str, Any]:
    known = {"threads", "graph_optimization_level", "config"}
    if not set(session) <= known:
        raise VerificationError(f"unknown session settings {sorted(set(session) - known)}; known are {sorted(known)}")
    level, threads = session.get("graph_optimization_level", "all"), session.get("threads", torch.get_num_threads())
    config = {**_CONFIG, **session.get("config", {})}
    if level not in _LEVELS or type(threads) is not int or not 1 <= threads <= 1024:
        raise VerificationError(
            f"session settings {dict(session)}: a level of {', '.join(_LEVELS)} and 1 to 1024 threads are possible"
        )
    if not set(config) <= set(_CONFIG) or not all(isinstance(value, str) for value in config.values()):
        raise VerificationError(
            f"unknown session config entries {sorted(set(config) - set(_CONFIG))}; known are {sorted(_CONFIG)}"
        )
    return {"threads": threads, "graph_optimization_level": level, "config": config}


class _typed:
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


def _feed(path: Path, session: Any, inputs: Inputs, by_name: bool) -> dict[str, Any]:
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


def _scopes(graph: onnx.GraphProto) -> dict[str, list[str]]:
    steps = [Step(list(node.output), list(node.input), _scopes_of(node)) for node in graph.node]
    return scope_values(steps, [output.name for output in graph.output])


def _scopes_of(node: onnx.NodeProto) -> frozenset[str]:
    text = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), "")
    try:
        scopes = ast.literal_eval(text) if text and len(text) < 1 << 16 else []
    except (ValueError, SyntaxError):
        return frozenset()  # only explains, never decides: an unreadable scope is no scope
    if not isinstance(scopes, list) or not all(isinstance(scope, str) for scope in scopes):
        return frozenset()
    return frozenset([*filter(None, scopes[:-1]), *(f"%{name}" for name in scopes[-1:])])


def _floating(model: onnx.ModelProto) -> set[str]:
    """Values that may be compared: those not known to be of another than a floating type."""
    onnx = require("onnx", "onnx")
    known = {entry.name: entry.type.tensor_type.elem_type for entry in (*model.graph.value_info, *model.graph.output)}
    floats = {onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16}
    return {
        name for node in model.graph.node for name in node.output if known.get(name, onnx.TensorProto.FLOAT) in floats
    }
