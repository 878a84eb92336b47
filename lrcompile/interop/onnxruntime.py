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
from lrcompile.interop.onnx_adapters import Interface, Loaded, names_of
from lrcompile.interop.onnx_safety import check
from lrcompile.interop.onnx_sessions import LEVELS, feed_of, settings_of, typed
from lrcompile.verifying.outputs import Inputs
from lrcompile.verifying.provenance import Scopes, Step

if TYPE_CHECKING:
    import onnx

    from lrcompile.verifying.intermediates import Found
    from lrcompile.verifying.runners import Layers

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
        self._loaded: dict[tuple[str, ...], Loaded] = {}
        self.active, self._by_name = active, by_name
        self._path = path
        self._settings = settings_of(session or {})
        self._model = check(path)
        self._adapters(active)
        self._session = self._open(self._model)

    @property
    def size(self) -> int:
        """Bytes of the file and of what lies beside it for its tensors."""
        outside = {
            entry.value
            for tensor in self._model.graph.initializer
            for entry in tensor.external_data
            if entry.key == "location"
        }
        return sum(path.stat().st_size for path in (self._path, *(self._path.parent / name for name in outside)))

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

        loaded = self._adapters(self.active if adapters is None else names_of(adapters))
        with typed(self._path):
            step = steps(self._session, empty, loaded.values)

        def reported(given: dict[str, Tensor]) -> Tensor:
            with typed(self._path):
                return step(given)

        return reported

    @property
    def adapters(self) -> tuple[str, ...]:
        """Those there are."""
        return tuple(self._interface.files) if self._interface is not None else ()

    def run(self, inputs: Inputs, adapters: str | Iterable[str] | None = None) -> dict[str, Tensor]:
        """The outputs by name. `adapters`: one or several that act in this run, () for none; None: those `active`."""
        active = self.active if adapters is None else names_of(adapters)
        inputs = pytree.tree_map(lambda each: torch.from_numpy(each) if isinstance(each, np.ndarray) else each, inputs)
        return self._run(self._session, [output.name for output in self._model.graph.output], inputs, active)

    @property
    def model(self) -> onnx.ModelProto:
        """The checked structure; external data unread."""
        return self._model

    def intermediates(self, inputs: Inputs, shapes: Mapping[str, torch.Size]) -> dict[str, Found]:
        """The values of the reference's places, all from one run of one session in which they are marked as outputs."""
        from lrcompile.verifying.intermediates import matched

        return matched(self._scopes(), self.values(self._model, inputs), shapes)

    def choices(self, inputs: Inputs) -> list[Tensor]:
        """Which experts its routers take: the indices of every TopK, in order."""
        onnx = require("onnx", "onnx")
        wanted = [node.output[1] for node in self._model.graph.node if node.op_type == "TopK" and len(node.output) > 1]
        marked = onnx.ModelProto()
        marked.CopyFrom(self._model)
        present = {output.name for output in marked.graph.output}
        marked.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted if name not in present)
        return list(self._run(self._open(marked), wanted, inputs, self.active).values()) if wanted else []

    def places(self, inputs: Inputs, model: onnx.ModelProto | None = None) -> dict[str, Tensor]:
        """The value that leaves each scope last, and the one that enters it where it is one, in the order of the graph;
        of a `model` with this one's names.
        """
        values = self.values(model or self._model, inputs)
        return {place: values[name] for place, name in self._ends().items()}

    def places_from(
        self, inputs: Inputs, given: Mapping[str, Tensor], model: onnx.ModelProto | None = None
    ) -> dict[str, Tensor]:
        """What the graph, or a `model` with its names, makes at each place of `given`, going on from there with the
        value given, which has the place's type and shape.
        """
        from lrcompile.interop.onnx_forcing import forced

        ends = {place: name for place, name in self._ends().items() if place in given}
        arrays = {name: given[place].contiguous().numpy() for place, name in ends.items()}
        rewritten, own = forced(model or self._model, arrays)
        feed = {**feed_of(self._path, self._session, inputs, self._by_name), **arrays}
        values = self._fed(self._open(rewritten), list(own.values()), feed, self.active) if own else {}
        return {place: values[own[name]] for place, name in ends.items()}

    def _ends(self) -> dict[str, str]:
        """The name of each place's value, in the order of the graph."""
        from lrcompile.verifying.intermediates import ENTERING

        scopes = self._scopes()
        order = {name: index for index, name in enumerate(self._shown(scopes))}
        found: dict[str, str] = {}
        for scope, names in scopes.leaving.items():
            leaving = [name for name in names if name in order]
            if leaving:
                found[scope] = leaving[0]
        for scope, names in scopes.entering.items():
            entering = [name for name in names if name in order]
            if len(entering) == 1 and not scope.startswith("%"):
                found[f"{ENTERING}{scope}"] = entering[0]

        def place(name: str) -> tuple[int, bool, bool, int]:
            """Where two scopes end at one value, the innermost module comes first, and what it enters last."""
            return order[found[name]], name.startswith("%"), name.startswith(ENTERING), -len(name)

        return {name: found[name] for name in sorted(found, key=place)}

    def _shown(self, scopes: Scopes) -> list[str]:
        """Every floating value of the graph's nodes that leaves or enters a scope."""
        floats = _floating(self._model)
        asked = {name for names in (*scopes.leaving.values(), *scopes.entering.values()) for name in names}
        return [name for node in self._model.graph.node for name in node.output if name in asked and name in floats]

    def values(self, model: onnx.ModelProto, inputs: Inputs) -> dict[str, Tensor]:
        """Every floating value of this graph's nodes that leaves or enters a scope, as `model` computes it."""
        onnx, wanted = require("onnx", "onnx"), self._shown(self._scopes())
        marked = onnx.ModelProto()
        marked.CopyFrom(model)
        present = {output.name for output in marked.graph.output}
        marked.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted if name not in present)
        return self._run(self._open(marked), wanted, inputs, self.active) if wanted else {}

    def outputs_of(self, model: onnx.ModelProto, inputs: Inputs) -> dict[str, Tensor]:
        """What `model`, a rewritten copy of this one, gives for the outputs."""
        return self._run(self._open(model), [output.name for output in self._model.graph.output], inputs, self.active)

    def extract(self, inputs: Inputs, place: str | None) -> tuple[onnx.ModelProto, dict[str, Tensor], list[str]]:
        """The nodes behind a place as a model of its own, with its weights inside; what enters it; its outputs."""
        from lrcompile.interop.onnx_cutting import part

        target, ends = (None, set()) if place is None else self._around(place)
        wanted = [output.name for output in self._model.graph.output] if target is None else [target]
        feed = feed_of(self._path, self._session, inputs, self._by_name)
        values = {name: torch.from_numpy(value) for name, value in feed.items()} | self.values(self._model, inputs)
        model, entering = part(self._path, self._model, wanted, ends, {name: values[name] for name in values})
        return model, {name: values[name] for name in entering}, wanted

    def _around(self, place: str) -> tuple[str, set[str]]:
        """The value of a place, and the values that bound the nodes behind it."""
        from lrcompile.verifying.intermediates import ENTERING

        scopes, floats, scope = self._scopes(), _floating(self._model), place.removeprefix(ENTERING)
        names = scopes.entering.get(scope, []) if place.startswith(ENTERING) else scopes.leaving.get(scope, [])
        made = [name for name in names if name in floats]
        if not made:
            raise VerificationError(f"{place} has no node of its own in {self._path}")
        modules = (values[0] for key, values in scopes.leaving.items() if not key.startswith("%"))
        ends = set(modules) if place.startswith(ENTERING) else set(scopes.entering[scope])
        return made[0], ends - {made[0]}

    def _scopes(self) -> Scopes:
        graph = self._model.graph
        steps = [Step(list(node.output), list(node.input), _scopes_of(node)) for node in graph.node]
        makers = {name: f"{node.op_type} {node.name}".strip() for node in graph.node for name in node.output}
        return Scopes.of(steps, [output.name for output in graph.output], makers)

    def _open(self, model: onnx.ModelProto) -> Any:
        ort = require("onnxruntime", "onnx")
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._settings["threads"]
        options.inter_op_num_threads = 1
        options.graph_optimization_level = getattr(
            ort.GraphOptimizationLevel, LEVELS[self._settings["graph_optimization_level"]]
        )
        options.log_severity_level = 3
        for key, value in self._settings["config"].items():
            options.add_session_config_entry(key, value)
        # The bytes that were checked are the ones that run; external data is looked up in the same folder.
        options.add_session_config_entry(_FOLDER, str(self._path.parent.resolve()))
        with typed(self._path):
            return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def _adapters(self, names: tuple[str, ...]) -> Loaded:
        if names and self._interface is None:
            raise AdapterError(f"{self._path} takes no adapters; export it with adapters='inputs'")
        if names not in self._loaded:
            self._loaded[names] = self._interface.load(names) if self._interface is not None else Loaded([], {})
        return self._loaded[names]

    def _run(self, session: Any, names: list[str], inputs: Inputs, active: tuple[str, ...]) -> dict[str, Tensor]:
        return self._fed(session, names, feed_of(self._path, session, inputs, self._by_name), active)

    def _fed(self, session: Any, names: list[str], feed: dict[str, Any], active: tuple[str, ...]) -> dict[str, Tensor]:
        options = require("onnxruntime", "onnx").RunOptions()
        for adapter in self._adapters(active).adapters:
            options.add_active_adapter(adapter)
        with typed(self._path):
            values = session.run(names, feed, options)
        return {name: torch.from_numpy(value.copy()) for name, value in zip(names, values, strict=True)}


def _scopes_of(node: onnx.NodeProto) -> frozenset[str]:
    text = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), "")
    if not text:  # not of torch's exporter: between two such files a value's own name is all there is
        return frozenset(f"%{name}" for name in node.output[:1])
    try:
        scopes = ast.literal_eval(text) if text and len(text) < 1 << 16 else []
    except (ValueError, SyntaxError):
        return frozenset()  # only explains, never decides: an unreadable scope is no scope
    if not isinstance(scopes, list) or not all(isinstance(scope, str) for scope in scopes):
        return frozenset()
    return frozenset([*scopes[:-1], *(f"%{name}" for name in scopes[-1:])])


def _floating(model: onnx.ModelProto) -> set[str]:
    """Values that may be compared: those not known to be of another than a floating type."""
    onnx = require("onnx", "onnx")
    known = {entry.name: entry.type.tensor_type.elem_type for entry in (*model.graph.value_info, *model.graph.output)}
    floats = {onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16}
    return {
        name for node in model.graph.node for name in node.output if known.get(name, onnx.TensorProto.FLOAT) in floats
    }
