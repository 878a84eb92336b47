"""`nn.Linear` and `transformers`' `Conv1D`: y = xWᵀ + b, the latter with W stored as [in, out]."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lrcompile.hosting import Host
from lrcompile.int8.modules import is_int8
from lrcompile.sites.site import Slot

NAME = "linear"
KINDS = ("linear", "conv1d")


class AdaptedLinear(Host):
    """The base's forward, then each live adapter."""

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        y = super().forward(*args, **kwargs)  # type: ignore[misc]
        (x,) = args or kwargs.values()
        for adapter in self.lrcompile_adapters["weight"].live:  # type: ignore[attr-defined]
            y = adapter(y, x, self)
        return y


HOST = AdaptedLinear

REPLACED = "its forward was replaced on the instance (as accelerate's device hooks do); remove that first"


def conv1d() -> Any:
    """`transformers.pytorch_utils.Conv1D`, or None as long as nobody imported transformers."""
    module = sys.modules.get("transformers.pytorch_utils")
    return getattr(module, "Conv1D", None)


def slots(module: nn.Module) -> list[Slot] | None:
    transposed = conv1d() is not None and isinstance(module, conv1d())
    if not (isinstance(module, nn.Linear) or transposed):
        return None
    if "forward" in module.__dict__:
        return [Slot("weight", refusal=REPLACED)]
    base: Any = conv1d() if transposed else nn.Linear
    if not keeps_forward(module, base):
        return None  # its own forward: `parameter` finds out what that does with the weight
    kind = "conv1d" if transposed else "linear"
    if refusal := refusal_of(module):
        return [Slot("weight", refusal=refusal, kind=kind)]
    if transposed:
        return [Slot("weight", module.nx, module.nf, transposed=True, kind=kind)]  # type: ignore[arg-type]
    return [Slot("weight", module.in_features, module.out_features, kind=kind)]  # type: ignore[arg-type]


def keeps_forward(module: nn.Module, base: type[nn.Module]) -> bool:
    """Is `base.forward` what runs, below the classes generated here?"""
    for cls in type(module).__mro__:
        if "forward" in cls.__dict__:
            if cls.__dict__["forward"] is base.forward:
                return True
            if not issubclass(cls, Host):
                return False
    return False


def refusal_of(module: nn.Module) -> str | None:
    """Why the weight of `module` is not a plain tensor that an update can be folded into."""
    if parametrize.is_parametrized(module):
        return (
            "its weight is computed by a parametrization; call torch.nn.utils.parametrize.remove_parametrizations first"
        )
    weight = module._parameters.get("weight")
    if weight is None:
        if "weight_codes" in module._buffers:
            return None
        if "weight_integers" in module._buffers:
            return "its weight is stored as integers, for deployment; adapt the model before it is quantized so"
        if is_int8(module):
            return (
                "an adapter holds its weight in INT8 and trains it; lrcompile.remove(model, keep_trained_weights=True)"
                " first"
            )
        return "its weight is computed by a hook (old-style weight_norm or spectral_norm); remove that first"
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "its weight is not initialised yet; run one batch through the model first"
    if not weight.is_floating_point():
        return f"its weight is stored as {weight.dtype}; quantize with lrcompile.quantize instead"
    if type(weight) not in (nn.Parameter, torch.Tensor):
        return f"its weight is a {type(weight).__name__}, not a plain tensor"
    return None
