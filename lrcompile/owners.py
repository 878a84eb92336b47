"""Which modules hold a parameter: weights that are one tensor under several names."""

from __future__ import annotations

from torch import nn

from lrcompile.walking import modules


def owners_of_parameters(model: nn.Module) -> dict[int, list[str]]:
    """Every name each parameter object goes by, one for each module that holds it."""
    owners: dict[int, list[str]] = {}
    for prefix, module in modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{prefix}.{name}" if prefix else name)
    return owners
