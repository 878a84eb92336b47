"""Lower a captured program to an ONNX model that ONNX Runtime accepts, weights still unevaluated.

`torch.onnx` translates; this module decides what it must not: no weight is folded or transposed in memory (transposes
of held tensors are pending, evaluated when written), 4-bit codes stay codes, and dimensions carry the names users
know.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import onnx
import onnx_ir as ir
import onnxscript.optimizer
import torch
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype
from torch import Tensor

from lrcompile.deployment.capture import Captured, renamed
from lrcompile.deployment.swapping import GraphInput
from lrcompile.errors import ExportError
from lrcompile.interop import onnx_integers, onnx_nf4
from lrcompile.interop.onnx_attention import zero_unattended
from lrcompile.interop.onnx_complex import unsqueeze_pairs
from lrcompile.interop.onnx_inputs import give_defaults, open_inputs
from lrcompile.interop.onnx_nf4 import expand_absmax
from lrcompile.passes.base import Pending

OPSETS = range(18, 26)  # torch's translations start at 18, and its converter has no way to 26
DEFAULT_OPSET = 20
_LOWEST_IR, _HIGHEST_IR = 10, 13
_LARGE = 1024  # elements; smaller tensors are constants rather than weights and may be folded


def lower(
    captured: Captured,
    pending: Mapping[str, Pending],
    opset: int | None = None,
    inputs: Sequence[GraphInput] = (),
    *,
    portable_nf4: bool = False,
) -> ir.Model:
    """The ONNX model of a captured program; `pending` weights are computed when written, the tensors that `inputs` name
    become inputs with a default. The program is consumed. `portable_nf4`: NF4 codes are read by standard operators
    alone.

    Raises ExportError for an opset out of range and for an operation ONNX has no form of.
    """
    opset = check_opset(opset)
    codes = expand_absmax(captured.program)
    unsqueeze_pairs(captured.program)
    with _quietly():
        try:
            lowered = torch.onnx.export(
                captured.program,
                dynamo=True,
                optimize=False,
                verbose=False,
                opset_version=opset,
                output_names=list(captured.outputs),
                custom_translation_table={**onnx_nf4.translation(portable_nf4), **onnx_integers.translation()},
            )
        except torch.onnx.OnnxExporterError as error:
            # its own text is advice on reporting bugs to PyTorch; the causes are what the user can act on
            raise ExportError(f"the captured program has no ONNX form: {_causes(error)}") from error
    assert lowered is not None  # only the old exporter returns None
    model = lowered.model
    if model.opset_imports.get("") != opset:  # torch only logs that its conversion failed
        raise ExportError(
            f"the model's operations cannot be expressed in opset {opset}; try the default, {DEFAULT_OPSET}"
        )
    _install(model, pending)
    opened = open_inputs(model, inputs)
    _fold_transposes(model)
    protected = {
        name for name in model.graph.initializers if name in codes or _is_large(model.graph.initializers[name])
    }
    onnxscript.optimizer.optimize_ir(model, should_fold=_unless_reading(protected))
    give_defaults(model, opened)
    zero_unattended(model)
    _rename(model, captured)
    _forget_machine(model)
    model.producer_name = "lrcompile"
    model.ir_version = max(_LOWEST_IR, onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)]))
    if model.ir_version > _HIGHEST_IR:
        raise ExportError(
            f"opset {opset} needs IR version {model.ir_version}; ONNX Runtime reads {_HIGHEST_IR} at most"
        )
    return model


def _causes(error: BaseException) -> str:
    """The first lines of what led to `error`, the nearest first: the node, then why it has no translation."""
    lines = []
    while (cause := error.__cause__) is not None:
        first = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        lines.append(first.removesuffix(" See the stack trace for more information."))
        error = cause
    return "; ".join(lines) or str(error)


def check_opset(opset: int | None) -> int:
    if opset is None:
        return DEFAULT_OPSET
    if isinstance(opset, bool) or not isinstance(opset, int) or opset not in OPSETS:
        raise ExportError(
            f"opset={opset!r}: expected an integer from {OPSETS[0]} to {OPSETS[-1]}, which ONNX Runtime runs"
        )
    return opset


def _is_large(value: ir.Value) -> bool:
    return value.const_value is not None and value.const_value.size >= _LARGE


def _install(model: ir.Model, pending: Mapping[str, Pending]) -> None:
    initializers = model.graph.initializers
    for name, weight in pending.items():
        if name in initializers:
            initializers[name].const_value = lazy(weight, weight.dtype, weight.shape, name)


def lazy(compute: Callable[[], Tensor], dtype: torch.dtype, shape: torch.Size, name: str) -> ir.LazyTensor:
    """A tensor of the graph that exists only while it is written."""
    return ir.LazyTensor(
        lambda: TorchTensor(compute().contiguous(), name=name),
        dtype=from_torch_dtype(dtype),
        shape=ir.Shape(shape),
        name=name,
    )


def _fold_transposes(model: ir.Model) -> None:
    """Store a weight that is only ever read transposed that way round, as `<name>.T`."""
    for name, value in list(model.graph.initializers.items()):
        readers = [node for node, _ in value.uses()]
        orders = {tuple(node.attributes["perm"].as_ints()) if _is_transpose(node) else None for node in readers}
        if value.is_graph_output() or len(orders) != 1 or None in orders or value.const_value is None:
            continue
        (order,) = orders
        tensor = value.const_value
        shape = torch.Size(tensor.shape.numpy()[axis] for axis in order)  # type: ignore[union-attr]
        turned = ir.Value(name=f"{name}.T", type=value.type, shape=ir.Shape(shape))
        turned.const_value = ir.LazyTensor(
            lambda tensor=tensor, order=order: _turned(tensor, order),  # type: ignore[misc]
            dtype=tensor.dtype,
            shape=ir.Shape(shape),
            name=turned.name,
        )
        model.graph.initializers.pop(name)
        model.graph.register_initializer(turned)
        for node in readers:
            ir.convenience.replace_all_uses_with(node.outputs[0], turned)
            model.graph.remove(node, safe=True)


def _is_transpose(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and node.domain == "" and "perm" in node.attributes and len(node.inputs) == 1


def _turned(tensor: ir.TensorProtocol, order: tuple[int, ...] | None) -> ir.TensorProtocol:
    return ir.Tensor(tensor.numpy().transpose(order), dtype=tensor.dtype)


def _unless_reading(protected: set[str]) -> Callable[[ir.Node], bool | None]:
    return lambda node: False if any(each is not None and each.name in protected for each in node.inputs) else None


def _rename(model: ir.Model, captured: Captured) -> None:
    def named(dimension: int | ir.SymbolicDim) -> int | str | None:
        if isinstance(dimension, int) or dimension.value is None:
            return dimension if isinstance(dimension, int) else None
        return renamed(dimension.value, captured.dimensions)

    graph = model.graph
    for value in graph.inputs:
        value.name = captured.inputs.get(str(value.name), value.name)
    for value in [*graph.inputs, *graph.outputs, *(out for node in graph.all_nodes() for out in node.outputs)]:
        if value.shape is not None:
            value.shape = ir.Shape([named(dimension) for dimension in value.shape])


def _forget_machine(model: ir.Model) -> None:
    """Stack traces name files of the machine that exported; the provenance of a node (its name scopes) stays."""
    for node in model.graph.all_nodes():
        for key in [key for key in node.metadata_props if key.endswith("stack_trace")]:
            del node.metadata_props[key]


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the exporter's notes about packages it does not need (torchvision), outputs that are None, and its own
    internals.
    """
    loggers = [logging.getLogger(f"torch.onnx._internal.exporter.{name}") for name in ("_registration", "_core")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r".*LeafSpec.* is deprecated", category=FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
