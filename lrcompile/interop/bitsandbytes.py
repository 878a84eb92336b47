"""bitsandbytes' `Linear4bit`, as `from_pretrained` with `load_in_4bit` leaves it: W ≈ c[q]·m, q and m taken over as
they are.

Its storage of NF4 is ours, so no weight is quantized again; what changes is the module that reads it. bitsandbytes
packs the codes anew when a CPU first runs a model in evaluation, and rounds the block maxima to bfloat16 with that:
such a weight is not the one that was loaded any more, and refused.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lrcompile.errors import TargetError
from lrcompile.kernels.nf4_dequant import BLOCK_SIZES, Nf4
from lrcompile.kernels.nf4_dequant.storage import ABSMAX_BLOCK, CODEBOOK, DYNAMIC_CODEBOOK
from lrcompile.nf4.modules import Layout, attach, detach
from lrcompile.wording import listed

_OWN = ("compute_dtype", "compute_type_is_set", "quant_state", "quant_storage", "support_avx512bf16_for_cpu")
"""Attributes of a Linear4bit that nothing reads once its class is another."""
_MARKS = ("is_quantized", "is_loaded_in_4bit", "is_4bit_serializable", "quantization_method", "hf_quantizer")
"""By which `transformers` knows a model of bitsandbytes', refuses to cast it and to train anything but PEFT's on it."""


@contextmanager
def taken_over(model: nn.Module) -> Iterator[tuple[str, ...]]:
    """Every Linear4bit of `model` as a linear map of ours; as they were again if what follows fails. Yields the names.

    The map answers in x's dtype as before, and computes in `bnb_4bit_compute_dtype`, or else in the dtype of the weight
    that was quantized. Raises `TargetError` that lists what cannot be taken over, the model then being as it was.
    """
    found = {name: module for name, module in model.named_modules() if _is_linear4bit(module)}
    if refused := {name: reason for name, module in found.items() if (reason := _obstacle(module))}:
        reasons = "; ".join(f"{name or 'the model itself'}: {reason}" for name, reason in refused.items())
        raise TargetError(f"the weights of bitsandbytes cannot be taken over as they are: {reasons}")
    undo: list[tuple[nn.Module, type[nn.Module], nn.Parameter, dict[str, Any]]] = []
    marks: list[tuple[dict[str, Any], dict[str, Any]]] = []
    try:
        for module in found.values():
            weight: Any = module._parameters["weight"]
            undo.append((module, type(module), weight, _removed(module.__dict__, _OWN)))
            nf4, layout = _codes(weight), _layout(module, undo[-1][-1])
            module.__class__ = nn.Linear
            attach(module, nf4, layout)
        if found:
            for module in model.modules():
                marks.append((module.__dict__, _removed(module.__dict__, _MARKS)))
                config = getattr(getattr(module, "config", None), "__dict__", {})
                marks.append((config, _removed(config, ("quantization_config",))))
        yield tuple(found)
    except BaseException:
        for held, values in marks:
            held.update(values)
        for module, original, weight, own in undo:
            if type(module) is not original:
                detach(module, weight)
                module.__class__ = original
            module.__dict__.update(own)
        raise


def _is_linear4bit(module: nn.Module) -> bool:
    library: Any = sys.modules.get("bitsandbytes.nn")
    return library is not None and isinstance(module, library.Linear4bit)


def _obstacle(module: nn.Module) -> str | None:
    library: Any = sys.modules["bitsandbytes.nn"]
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance (as accelerate's device hooks do); remove that first"
    if type(module).forward is not library.Linear4bit.forward:
        return f"{type(module).__name__} has a forward of its own"
    weight: Any = module._parameters["weight"]
    state = getattr(weight, "quant_state", None)
    if state is None:
        return "it is not quantized yet; move the model to its device first"
    if state.quant_type != "nf4":
        return f"it is {state.quant_type}; load it with bnb_4bit_quant_type='nf4'"
    if getattr(state, "packing_format_for_cpu", False):
        return (
            "it was run in evaluation on this CPU, for which bitsandbytes packed it anew and rounded its maxima to"
            " bfloat16; load the model again, and hand it over before its first forward"
        )
    if state.blocksize not in BLOCK_SIZES:
        return f"its blocks have {state.blocksize} elements; NF4 here has {', '.join(map(str, BLOCK_SIZES))}"
    inner = state.state2
    tables = [(state.code, CODEBOOK)] + ([] if inner is None else [(inner.code, DYNAMIC_CODEBOOK)])
    if any(theirs.tolist() != torch.tensor(ours).tolist() for theirs, ours in tables):
        return "its table of values is not NF4's"
    if inner is not None and inner.blocksize != ABSMAX_BLOCK:
        return f"{inner.blocksize} of its maxima share one of the second level, not {ABSMAX_BLOCK}"
    return None


def _codes(weight: Any) -> Nf4:
    state = weight.quant_state
    codes: Tensor = weight.data.reshape(-1).view(torch.uint8)
    if state.state2 is None:
        return Nf4(codes, state.absmax.to(torch.float32))
    return Nf4(codes, state.absmax, state.state2.absmax, state.offset.to(torch.float32))


def _layout(module: nn.Module, own: dict[str, Any]) -> Layout:
    weight: Any = module._parameters["weight"]
    state = weight.quant_state
    out_features, in_features = state.shape
    compute = own.get("compute_dtype") if own.get("compute_type_is_set") else None
    return Layout(out_features, in_features, False, state.blocksize, state.dtype, compute)


def _removed(held: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: held.pop(name) for name in names if name in held}


def note(names: tuple[str, ...]) -> list[str]:
    """What the report says of them."""
    if not names:
        return []
    return [f"{len(names)} weights were bitsandbytes' Linear4bit and are NF4 with the same codes: {listed(names)}"]
