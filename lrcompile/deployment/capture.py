"""Capture a model as a `torch.export` program in which every example input is its own, and batch and sequence vary.

Three things `torch.export` leaves to its caller, and gets silently wrong otherwise: two arguments that are the same
tensor object become one input, so each is cloned; a dimension of size 1 is baked in, so it is enlarged first; outputs
and dimensions carry generated names, so the model's own (`logits`, `batch`) are recovered here.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import Dim
from torch.export.graph_signature import ConstantArgument, OutputKind, SymIntArgument
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree

from lrcompile.errors import ExportError, VerificationError
from lrcompile.hosting import original_class
from lrcompile.int8.modules import plain_weights
from lrcompile.verifying.outputs import dotted, named_outputs

Inputs = Mapping[str, Any] | tuple[Any, ...]


@dataclass(frozen=True)
class Captured:
    """A captured program and the names its inputs, outputs and varying dimensions go by outside."""

    program: torch.export.ExportedProgram
    inputs: dict[str, str]  # name in the program -> name
    outputs: tuple[str, ...]
    dimensions: dict[str, str]  # symbol of the program -> name
    limits: dict[str, int]  # name -> largest size the model accepts, where it has one
    examples: tuple[tuple[Any, ...], dict[str, Any]]  # the (cloned, perhaps enlarged) arguments
    shapes: Any  # what varies, in torch.export's form


def capture(
    model: nn.Module, example_inputs: Inputs, dynamic_shapes: Any = None, *, free: tuple[str, ...] = ()
) -> Captured:
    """The program of `model(*args)` or `model(**kwargs)` in evaluation mode; the model is left exactly as it was.

    `dynamic_shapes`: None makes dimension 0 of every tensor and dimension 1 of integer tensors vary, "static" freezes
    all sizes, anything else is handed to `torch.export`. Inputs that are not tensors are constants of the program.
    `free`: the names of those sizes that have to vary each by itself, but may be bounded together (past + sequence by
    a table of positions), for which `torch.export` has no form. Raises ExportError when the inputs do not fit, the
    model cannot be captured, or a size that should vary cannot.
    """
    args, kwargs = _own_copies(example_inputs)
    static = isinstance(dynamic_shapes, str)
    if static and dynamic_shapes != "static":
        raise ExportError(f"dynamic_shapes={dynamic_shapes!r}: expected None, 'static', or torch.export's own form")
    if dynamic_shapes is None:
        args, kwargs = _enlarge(args, kwargs)
    kwargs = _in_order(model, kwargs)
    bound = _bind(model, args, kwargs)
    if dynamic_shapes is None:
        _refuse_variadic(model, bound)
    shapes = pytree.tree_map(_varying, bound) if dynamic_shapes is None else None if static else dynamic_shapes
    with _evaluation(model), deployable(model), plain_weights(model):
        try:
            program = torch.export.export(model, args, kwargs, dynamic_shapes=_asked(shapes, free), strict=False)
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            name = original_class(model).__name__
            raise ExportError(f"{name} could not be captured by torch.export: {_why(error, free)}") from error
    _refuse_state(program, original_class(model).__name__)
    names = _dimension_names(program, shapes, bound)
    if tied := set(free) - set(names.values()):
        raise ExportError(f"{original_class(model).__name__} ties {', '.join(sorted(tied))} to other sizes or fixes it")
    limits = {
        names[str(symbol)]: int(interval.upper)
        for symbol, interval in program.range_constraints.items()
        if str(symbol) in names and interval.upper.is_Integer and interval.upper < 2**31 and not free
    }
    inputs, outputs = _input_names(program, bound), _output_names(program)
    return Captured(program, inputs, outputs, names, limits, (args, kwargs), shapes)


def _asked(shapes: Any, free: tuple[str, ...]) -> Any:
    """What torch.export is told: a named size is one that nothing bounds, a dynamic one whatever the model makes it."""
    return pytree.tree_map(lambda size: Dim.DYNAMIC if isinstance(size, Dim) else size, shapes) if free else shapes


def _why(error: Exception, free: tuple[str, ...]) -> str:
    """What torch says, and what can be done about it."""
    if isinstance(error, GuardOnDataDependentSymNode):
        said = str(error).strip().splitlines()[0]
        return (
            f"what it computes next depends on the values of its inputs, not only on their sizes ({said}), as in a loop"
            " over the experts that were hit. No graph has that; rewrite this part of the model with torch.where or"
            " masks"
        )
    if free:
        return (
            f"{error}\nA graph that generates has to take any {', '.join(free)}; one without a cache"
            " (use_cache=False) may fix sizes with dynamic_shapes"
        )
    return (
        f"{error}\nIf the message is about a dimension that cannot vary, give dynamic_shapes='static' or name the "
        "dimensions that may, in torch.export's form"
    )


def _refuse_state(program: torch.export.ExportedProgram, name: str) -> None:
    buffers = program.graph_signature.inputs_to_buffers
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        for given, argument in zip(node.args, schema.arguments if schema is not None else (), strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and (buffer := buffers.get(getattr(given, "name", ""))) is not None:
                raise ExportError(
                    f"{name}.forward writes its buffer {buffer!r}; a file keeps nothing from one call to the next, and"
                    " would compute each as if it were the first. Take it as an input and return it, or write it"
                    " outside the forward"
                )


def _own_copies(example_inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def own(leaf: Any) -> Any:
        return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf

    if isinstance(example_inputs, Mapping):
        return (), {name: pytree.tree_map(own, value) for name, value in example_inputs.items()}
    if isinstance(example_inputs, tuple):
        return tuple(pytree.tree_map(own, value) for value in example_inputs), {}
    raise ExportError(
        f"example_inputs is a {type(example_inputs).__name__}: expected a dict (called as model(**inputs)) "
        "or a tuple (called as model(*inputs))"
    )


def _enlarge(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Repeat what has size 1 along an axis that is to vary; what is 1 beside larger ones broadcasts, and is left."""
    for axis in (0, 1):

        def varies(leaf: Any, axis: int = axis) -> bool:
            return isinstance(leaf, torch.Tensor) and axis in _axes(leaf)

        sizes = {leaf.shape[axis] for leaf in pytree.tree_leaves((args, kwargs)) if varies(leaf)}
        if sizes == {1}:

            def twice(leaf: Any, axis: int = axis, varies: Any = varies) -> Any:
                return torch.cat((leaf, leaf), dim=axis) if varies(leaf) else leaf

            args, kwargs = pytree.tree_map(twice, (args, kwargs))
    return args, kwargs


def _axes(tensor: torch.Tensor) -> tuple[int, ...]:
    axes = (0,) if tensor.is_floating_point() or tensor.is_complex() else (0, 1)
    return axes[: tensor.dim()]


def _varying(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return None
    return {axis: Dim.DYNAMIC for axis in _axes(leaf) if leaf.shape[axis] != 1}


def _in_order(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """As the signature has them, whatever order they were given in: the program keeps the order of the call, and names
    and shapes are matched to it.
    """
    order = {name: index for index, name in enumerate(inspect.signature(model.forward).parameters)}
    return dict(sorted(kwargs.items(), key=lambda item: order.get(item[0], len(order))))


def _bind(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    signature = inspect.signature(model.forward)
    try:
        return dict(signature.bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise ExportError(
            f"example_inputs do not fit {type(model).__name__}.forward: {error}; it takes {signature}"
        ) from error


def _refuse_variadic(model: nn.Module, bound: dict[str, Any]) -> None:
    """torch.export has no form of varying sizes in which a `**kwargs` may hold anything."""
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD and bound.get(name):
            raise ExportError(
                f"{', '.join(bound[name])}: {type(model).__name__}.forward takes this through **{name} only, where"
                " torch.export cannot let sizes vary; leave it out (a transformers option belongs in model.config), or"
                " give dynamic_shapes='static'"
            )


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, flag in training:
            module.training = flag


_DEPLOYABLE = {"use_cache": False, "_experts_implementation_internal": "batched_mm"}


@contextmanager
def deployable(model: nn.Module) -> Iterator[None]:
    """With the settings of `transformers` configs that a graph needs, and their own ones again afterwards.

    A key-value cache among the outputs is an object that no deployed graph can return; experts dispatched by a loop
    over data, or through an opaque grouped product, have no form in one.
    """
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    before = [
        (config.__dict__, key, config.__dict__[key])
        for config in configs.values()
        for key in _DEPLOYABLE
        if getattr(config, "__dict__", {}).get(key)
    ]
    try:
        for held, key, _ in before:
            held[key] = _DEPLOYABLE[key]
        yield
    finally:
        for held, key, value in before:
            held[key] = value


def renamed(text: str, names: Mapping[str, str]) -> str:
    """A size that the program writes in symbols, as in `s22 + s70`, in names: `past + sequence`."""
    symbol = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")
    return symbol.sub(lambda match: names[match.group()], text) if names else text


def _input_names(program: torch.export.ExportedProgram, bound: dict[str, Any]) -> dict[str, str]:
    """By their place in the arguments, `past_key_values.0.key`; those that are tensors."""
    paths, _ = pytree.tree_flatten_with_path(bound)
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    return {
        name: dotted(path)
        for name, (path, _) in zip(program.graph_signature.user_inputs, paths, strict=True)
        if isinstance(name, str) and isinstance(values.get(name), torch.Tensor)
    }


def _output_names(program: torch.export.ExportedProgram) -> tuple[str, ...]:
    """The names verification knows the outputs by (`logits`, `hidden_states.0`), so that both sides meet by name."""
    names = leaf_names(program.call_spec.out_spec)
    kinds = [output.arg for output in program.graph_signature.output_specs if output.kind == OutputKind.USER_OUTPUT]
    if sizes := [name for name, kind in zip(names, kinds, strict=True) if isinstance(kind, SymIntArgument)]:
        raise ExportError(
            f"the output {sizes[0]} is a size of the inputs, no tensor; a file returns tensors: leave it out"
        )
    return tuple(name for name, kind in zip(names, kinds, strict=True) if not isinstance(kind, ConstantArgument))


def leaf_names(spec: pytree.TreeSpec) -> list[str]:
    """The name of each leaf of a structure of outputs."""
    try:
        named = named_outputs(pytree.tree_unflatten([torch.tensor(index) for index in range(spec.num_leaves)], spec))
    except VerificationError as error:
        raise ExportError(f"{error}; return tensors, or tuples, dicts or ModelOutputs of tensors") from error
    names = {int(index): name for name, index in named.items()}
    return [names[index] for index in range(spec.num_leaves)]


def _dimension_names(program: torch.export.ExportedProgram, shapes: Any, bound: dict[str, Any]) -> dict[str, str]:
    """Symbol -> name: the user's `Dim` names, else `batch` and `sequence`; other sizes are `<input>_dim<axis>`."""
    given = [spec if isinstance(spec, Mapping) else {} for spec in _flat_specs(shapes, bound)]
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    first: dict[int, int] = {}  # axis -> the example size that is called batch or sequence
    names: dict[str, str] = {}
    for name, spec in zip(program.graph_signature.user_inputs, given, strict=True):
        value = values.get(name) if isinstance(name, str) else None
        if not isinstance(value, torch.Tensor):
            continue
        for axis, size in enumerate(value.shape):
            if not isinstance(size, torch.SymInt) or not size.node.expr.is_Symbol or str(size) in names:
                continue
            own = getattr(spec.get(axis), "__name__", None)
            common = ("batch", "sequence")[axis] if axis in _axes(value) else None
            hint = size.node.hint
            if own is not None:
                names[str(size)] = own
            elif common is not None and first.setdefault(axis, hint) == hint:
                names[str(size)] = common
            else:
                names[str(size)] = f"{name}_dim{axis}"
    return names


def _flat_specs(shapes: Any, bound: dict[str, Any]) -> list[Any]:
    """One shape spec per leaf of the inputs, whatever form the user gave; {} where it says nothing."""
    if shapes is None:
        return [{}] * len(pytree.tree_leaves(bound))
    if isinstance(shapes, tuple | list):
        shapes = dict(zip(bound, shapes, strict=False))

    def normal(spec: Any) -> Any:
        return dict(enumerate(spec)) if isinstance(spec, tuple | list) else spec

    flat: list[Any] = []
    for name, value in bound.items():
        spec = shapes.get(name)
        if isinstance(value, torch.Tensor):
            flat.append(normal(spec))
        else:  # a nested input: its specs mirror its structure, down to one per tensor
            inner, inner_tree = pytree.tree_flatten(value)
            flat.extend([{}] * len(inner) if spec is None else [normal(s) for s in inner_tree.flatten_up_to(spec)])
    return flat
