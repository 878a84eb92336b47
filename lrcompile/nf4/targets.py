"""Which linear maps `quantize` takes, and why it cannot take the others."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lrcompile.errors import TargetError
from lrcompile.integers.modules import is_integers
from lrcompile.nf4.modules import is_nf4
from lrcompile.sites import ADAPTERS
from lrcompile.sites.linear import conv1d, keeps_forward, refusal_of
from lrcompile.targeting import ALL_LINEAR, is_router, output_heads, select


def chosen(
    model: nn.Module, targets: str | Sequence[str], exclude: str | Sequence[str]
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The modules to quantize by name, each once, and the reason for each that `"all-linear"` leaves alone.

    Raises `TargetError` where a target named outright cannot be taken, or nothing is left to do.
    """
    modules = model.named_modules(remove_duplicate=False)
    candidates = {name: module for name, module in modules if _is_linear_map(module)}
    if not candidates:
        raise TargetError(f"this {type(model).__name__} has no nn.Linear or Conv1D to quantize")
    everything = targets == ALL_LINEAR
    names = select(list(candidates), ".*" if everything else targets, exclude)
    obstacles = {name: reason for name in names if (reason := _obstacle(model, name, candidates[name]))}
    shared = _shared(model)
    weights = {name: id(candidates[name]._parameters.get("weight")) for name in names}
    obstacles |= {name: shared[key] for name, key in weights.items() if key in shared}
    if everything:
        obstacles |= {name: reason for name, reason in output_heads(model).items() if name in names}
        obstacles |= {name: "mixture router" for name in names if is_router(model, name)}
    elif obstacles:
        listed = "; ".join(f"{name or 'the model itself'}: {reason}" for name, reason in obstacles.items())
        raise TargetError(f"cannot be kept as NF4: {listed}. Leave them out of targets, or name them in exclude=")
    found: dict[int, str] = {}
    for name in names:
        if name not in obstacles:
            found.setdefault(id(candidates[name]), name)
    if not found:
        reasons = "; ".join(f"{name or 'the model itself'}: {reason}" for name, reason in obstacles.items())
        raise TargetError(f"nothing is left to quantize ({reasons or 'exclude= takes out every linear map'})")
    return {name: candidates[name] for name in found.values()}, obstacles


def _is_linear_map(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (conv1d() is not None and isinstance(module, conv1d()))


def _obstacle(model: nn.Module, name: str, module: nn.Module) -> str | None:
    if is_nf4(module):
        return "it is stored as NF4 already"
    if is_integers(module):
        return "it is stored as integers already"
    if ADAPTERS in module._modules:
        return "it carries an adapter; quantize before apply, or after merge(model, final=True)"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance (as accelerate's device hooks do); remove that patch first"
    if not keeps_forward(module, nn.Linear if isinstance(module, nn.Linear) else conv1d()):
        return f"{type(module).__name__} has a forward of its own, which may use the weight in another way"
    if refusal := refusal_of(module):
        return refusal
    weight = module._parameters["weight"]
    if weight is not None and weight.numel() == 0:
        return f"its weight is empty, {tuple(weight.shape)}"
    if name and isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
        return "nn.MultiheadAttention reads the weight past this module's forward"
    return None


def _shared(model: nn.Module) -> dict[int, str]:
    """By identity, each parameter that several modules hold (tied): codes in one would untie it from the rest."""
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for local, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(f"{name}.{local}" if name else local)
    return {key: f"its weight is shared: {' = '.join(names)}" for key, names in holders.items() if len(names) > 1}
