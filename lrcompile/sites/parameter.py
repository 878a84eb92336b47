"""A module that uses raw parameters of its own as linear maps: its forward is traced, and the traced nodes rewritten.

A trace is one path through Python, so it is made anew for each signature a call can take: which arguments are tensors,
the values of all others, the module's plain attributes (`training` among them) and the adapters that are live.
Submodules are called, not entered.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from lrcompile.errors import AdapterError
from lrcompile.hosting import Host, original_class
from lrcompile.sites.graph_rule import drop_constants, insert_adapters
from lrcompile.sites.site import Slot
from lrcompile.sites.tracing import trace
from lrcompile.sites.weight_uses import NotALinearMap, reads_of, uses_of

NAME = "parameter"

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)
_MACHINERY = frozenset(vars(nn.Module())) - {"training"}


class AdaptedParameters(Host):
    """Runs the base's forward as traced for this call's signature, with its live adapters inserted."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        cls = type(self)._lrcompile_original
        if not any(adapters.live for adapters in self.lrcompile_adapters._modules.values()):  # type: ignore[attr-defined]
            return cls.forward(self, *args, **kwargs)
        tensors, constants = _sorted_out(cls, inspect.signature(cls.forward).bind(self, *args, **kwargs))
        module: nn.Module = self  # type: ignore[assignment]
        key = (tuple(tensors), _plain(constants), _plain_attributes(module), _live(module), torch.is_grad_enabled())
        name = self._lrcompile_traced(key, constants)
        return getattr(self.lrcompile_adapters._traces, name)(self, **tensors)  # type: ignore[attr-defined]

    @torch.compiler.assume_constant_result
    def _lrcompile_traced(self, key: Any, constants: dict[str, Any]) -> str:
        """Under which name the trace for `key` is, made now if there is none. Dynamo calls this and does not enter it:
        a trace within its own would break its graph. All that the trace depends on is in `key`, so Dynamo guards it.
        (A number that it made an input of its graph breaks it still.)
        """
        module: nn.Module = self  # type: ignore[assignment]
        traces = vars(module._modules["lrcompile_adapters"]).setdefault("_traces", Traces())
        if key not in traces.names:
            name = f"trace_{len(traces.names)}"
            setattr(traces, name, _compiled(module, constants))
            traces.names[key] = name
        return traces.names[key]


class Traces:
    """Forwards as traced, each an attribute: a compiled graph depends on the one it calls and on no other. Kept beside
    the adapters; a copy starts empty.
    """

    def __init__(self) -> None:
        self.names: dict[Any, str] = {}

    def __reduce__(self) -> Any:
        return (Traces, ())


HOST = AdaptedParameters


def slots(module: nn.Module) -> list[Slot] | None:
    """The raw matrices of `module`, each a site or a refusal; None when it has none, or belongs to torch itself."""
    own = {
        name: p for name, p in module._parameters.items() if p is not None and p.dim() >= 2 and p.is_floating_point()
    }
    if not own:
        return None
    cls = original_class(module)
    if cls.__module__.startswith("torch.nn.modules."):
        return [
            Slot(name, refusal=f"{cls.__name__} does not use it as a linear map that can be rewritten") for name in own
        ]
    try:
        graph = trace(module, _default_constants(cls))
    except Exception as error:
        reason = f"{cls.__name__}.forward cannot be traced, so its use of this weight is unknown: {_first_line(error)}"
        return [Slot(name, refusal=reason) for name in own]
    reads = reads_of(graph)
    return [slot_of(reads.get(name, ()), name, weight) for name, weight in own.items()]


def slot_of(reads: Sequence[fx.Node], name: str, weight: torch.Tensor) -> Slot:
    """What a graph, in which these nodes read it, does with the attribute `name`, as a slot."""
    try:
        uses = uses_of(reads, weight.shape)
    except NotALinearMap as error:
        return Slot(name, refusal=error.reason)
    if not uses:
        return Slot(name, refusal="the forward never uses it")
    transposed = uses[0].transposed
    if weight.dim() not in (2, 3):
        return Slot(name, refusal=f"it has {weight.dim()} dimensions; a linear map has 2, a stack of them 3")
    if (
        weight.dim() == 3
        and uses[0].form == "product"
        and any(u.node.target is torch.nn.functional.linear for u in uses)
    ):
        return Slot(name, refusal="a stack of maps cannot be the weight of F.linear")
    rows, columns = weight.shape[-2:]
    copies = weight.shape[0] if weight.dim() == 3 else None
    return Slot(
        name, rows if transposed else columns, columns if transposed else rows, copies, transposed, form=uses[0].form
    )


def _sorted_out(cls: type[nn.Module], bound: inspect.BoundArguments) -> tuple[dict[str, Any], dict[str, Any]]:
    """A call's arguments as tensors and plain constants; anything else would be frozen into the trace, so it is
    refused.
    """
    bound.apply_defaults()
    tensors: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    for name, value in list(bound.arguments.items())[1:]:
        variadic = _is_variadic(bound.signature.parameters[name])
        if variadic and not value:
            continue
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        elif not variadic and isinstance(value, _PLAIN):
            constants[name] = value
        else:
            raise AdapterError(
                f"{cls.__name__}.forward was given {name}={type(value).__name__}; while its raw parameters are"
                " adapted it takes tensors,"
                " numbers, strings and None only"
            )
    return tensors, constants


def _compiled(module: nn.Module, constants: dict[str, Any]) -> Callable:
    cls = original_class(module)
    try:
        graph = trace(module, constants)
        insert_adapters(graph, module)
    except NotALinearMap as error:
        raise AdapterError(
            f"called this way, {cls.__name__} uses an adapted weight as no linear map: {error.reason}"
        ) from error
    except Exception as error:
        raise AdapterError(
            f"{cls.__name__}.forward cannot be traced for this call ({_first_line(error)}); its raw parameters"
            " cannot be adapted"
        ) from error
    parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    drop_constants(graph, [p.name for p in sorted(parameters, key=_is_variadic)], constants)
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(compile(code.src, f"<lrcompile: {cls.__name__}.forward>", "exec"), scope)
    return scope["forward"]


def _default_constants(cls: type[nn.Module]) -> dict[str, Any]:
    parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def _is_variadic(parameter: inspect.Parameter) -> bool:
    return parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _plain_attributes(module: nn.Module) -> Any:
    return tuple((name, _plain(value)) for name, value in vars(module).items() if name not in _MACHINERY)


def _plain(value: Any) -> Any:
    """What of `value` code can branch on, with its type: True, 1 and 1.0 are equal and yet differ."""
    if isinstance(value, dict):
        return dict, tuple((key, _plain(each)) for key, each in value.items())
    if isinstance(value, (tuple, list)):
        return type(value), tuple(map(_plain, value))
    return (type(value), value) if isinstance(value, _PLAIN) else None


def _live(module: nn.Module) -> Any:
    sets: Any = module._modules["lrcompile_adapters"]
    live = [(slot, name, sets[slot][name]) for slot in sets for name in sets[slot].live_names()]
    return tuple((slot, name, adapter.probability, adapter.variant) for slot, name, adapter in live)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
