"""Base parameters that a spec trains as they are, beside its adapters."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lrcompile import targeting, walking
from lrcompile.errors import TargetError
from lrcompile.names import within
from lrcompile.owners import owners_of_parameters
from lrcompile.sites.site import Site
from lrcompile.specs import Spec


def trained_in_full(model: nn.Module, spec: Spec, hit: Sequence[Site]) -> tuple[str, ...]:
    """The base parameters that `spec` trains as they are: those of `train_modules`, and biases.

    Raises `TargetError` for an entry that hits nothing, or a parameter that a module outside holds too.
    """
    if not spec.train_modules and spec.bias == "none":
        return ()
    if spec.train_modules:
        names = [name for name, _ in walking.modules(model, adapters=False) if name]
        targeting.require_hits(names, spec.train_modules, "train_modules")
    parameters = [name for name, _ in walking.parameters(model, adapters=False)]
    chosen = within(spec.train_modules, parameters)
    _refuse_tied(model, spec)
    if spec.train_modules and not chosen:
        raise TargetError(f"train_modules={list(spec.train_modules)} hold no parameters", field="train_modules")
    is_bias = lambda name: name.rpartition(".")[2].endswith("bias")  # noqa: E731
    if spec.bias == "all":
        chosen |= {name for name in parameters if is_bias(name)}
    elif spec.bias == "lora_only":
        hosts = {site.host for site in hit}
        chosen |= {name for name in parameters if is_bias(name) and name.rpartition(".")[0] in hosts}
    return tuple(name for name in parameters if name in chosen)


def _refuse_tied(model: nn.Module, spec: Spec) -> None:
    """A parameter in a fully trained module that another module holds too would change that one behind its back."""
    owners = owners_of_parameters(model).values() if spec.train_modules else ()
    chosen = within(spec.train_modules, [name for names in owners for name in names])
    for names in owners:
        inside, outside = [n for n in names if n in chosen], [n for n in names if n not in chosen]
        if inside and outside:
            raise TargetError(
                f"train_modules: {inside[0]} is one parameter with {outside[0]}, which would change with it; untie them"
                " first (config.tie_word_embeddings=False and a parameter of its own), or train both",
                field="train_modules",
            )
