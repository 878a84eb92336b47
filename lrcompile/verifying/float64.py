"""True float64 of the intended mathematics: the first rung of every verification.

`model.double()` is not enough. Models cast to float32 inside norms, softmax and RoPE, so such a "reference" is as far
off as float32 itself. `Float64` runs a doubled copy under modes that turn explicit casts, `dtype=` arguments and
created tensors into float64, and refuses when a narrower floating tensor is still produced.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from lrcompile.errors import VerificationError

if TYPE_CHECKING:
    from collections.abc import Iterator

_WIDE = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}
# These read Python numbers before the dispatcher sees anything: torch.tensor(0.1, dtype=torch.float32) would arrive
# already rounded.
_FROM_PYTHON = frozenset({torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor, Tensor.new_tensor})
# Reading bits as another type is not arithmetic; `_check` refuses what comes out if it is a narrow float.
_REINTERPRET = frozenset({torch.ops.aten.view.dtype})
_EXPERTS = "_experts_implementation_internal"
_OURS = ("lrcompile", "lrcompile_kernels")
"""Namespaces of the operators that read NF4 storage."""


def widen(value: Any) -> Any:
    """The exact float64 (complex128) form of a floating tensor; anything else as it is."""
    if isinstance(value, Tensor) and value.dtype in _WIDE:
        return value.to(_WIDE[value.dtype])
    return value


class _Literals(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _FROM_PYTHON and kwargs.get("dtype") in _WIDE:
            kwargs["dtype"] = _WIDE[kwargs["dtype"]]
        return func(*args, **kwargs)


class _Widen(TorchDispatchMode):
    """Every operation in float64. What enters narrow is stored data, whose widening is exact; what is *produced*
    narrow is an error.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._assert_tensor_metadata.default:
            return None  # an exported program asserts the very casts that are undone here
        if func in _REINTERPRET:
            return _check(func, func(*args, **(kwargs or {})))
        _refuse_lost_writes(func, args, kwargs or {})
        args, kwargs = tree_map(_argument, (args, kwargs or {}))
        if func.namespace in _OURS:
            args, kwargs = _stored_constants(func, args, kwargs)
        return _check(func, func(*args, **kwargs))


def _argument(value: Any) -> Any:
    return _WIDE.get(value, value) if isinstance(value, torch.dtype) else widen(value)


def _stored_constants(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """An NF4 base's block constants go back to float32, the type our operators take; they were stored so, hence
    exactly.
    """

    def narrow(name: str, value: Any) -> Any:
        stored = name.startswith("absmax") and isinstance(value, Tensor) and value.dtype == torch.float64
        return value.float() if stored else value

    names = [argument.name for argument in func._schema.arguments]
    narrowed = tuple(narrow(name, value) for name, value in zip(names, args, strict=False))
    return narrowed, {name: narrow(name, value) for name, value in kwargs.items()}


def _refuse_lost_writes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not func._schema.is_mutable:
        return
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write and _is_narrow(value):
            raise VerificationError(
                f"{func} writes into {value.dtype} {tuple(value.shape)} that the model keeps outside its "
                "parameters and buffers, so a float64 reference would lose the write; register it as a buffer"
            )
    for value in tree_leaves(kwargs.get("out")):
        if _is_narrow(value):
            raise VerificationError(
                f"{func} is given a {value.dtype} `out=`; a float64 reference cannot be computed into it"
            )


def _is_narrow(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in _WIDE


def _check(func: Any, result: Any) -> Any:
    for value in tree_leaves(result):
        if _is_narrow(value):
            raise VerificationError(
                f"{func} produced {value.dtype} {tuple(value.shape)} inside the float64 reference, "
                "which would be no better than the model it is to judge; "
                "compute this part with operators that follow their input's dtype"
            )
    return result


@contextmanager
def float64_mode() -> Iterator[None]:
    """All floating arithmetic inside runs in float64; gradients, autocast and fused attention are off."""
    default = torch.get_default_dtype()
    with ExitStack() as stack:
        # Under inference mode composite operators would reach the dispatch mode whole instead of as their parts.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        if torch.cuda.is_available():
            stack.enter_context(torch.autocast("cuda", enabled=False))
        stack.enter_context(torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH))
        stack.callback(torch.set_default_dtype, default)
        torch.set_default_dtype(torch.float64)  # Python numbers, and integers divided by integers, become this
        stack.enter_context(_Literals())
        stack.enter_context(_Widen())
        yield


def float64_copy(model: nn.Module) -> nn.Module:
    """A deep copy with every stored floating number widened exactly; `model` is untouched, hooks and adapters
    included.
    """
    twin = copy.deepcopy(getattr(model, "_orig_mod", model))
    twin.double()
    for module in twin.modules():
        config = getattr(module, "config", None)
        if getattr(config, _EXPERTS, None):
            setattr(config, _EXPERTS, "eager")  # grouped products of experts have no float64 kernel; the plain loop has
        for table in (module._parameters, module._buffers):
            for name, value in table.items():
                if value is None or value.dtype not in _WIDE or _is_block_constant(name):
                    continue
                # What `.double()` spares on purpose: an adapter's scale, and complex tables.
                table[name] = (
                    nn.Parameter(widen(value.detach()), value.requires_grad)
                    if isinstance(value, nn.Parameter)
                    else widen(value)
                )
    return twin


def _is_block_constant(name: str) -> bool:
    return "_absmax" in name


def widen_inputs(inputs: Any) -> Any:
    """A pytree of inputs with its floating tensors widened exactly, and every tensor copied."""
    return tree_map(lambda leaf: widen(leaf.detach().clone()) if isinstance(leaf, Tensor) else leaf, inputs)
