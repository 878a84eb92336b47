"""Which sites a spec means: PEFT's matching rules plus strictness, every entry must hit."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

from torch import nn

from lrcompile.errors import TargetError
from lrcompile.names import Patterns, endings, meant
from lrcompile.walking import modules, submodule

ALL_LINEAR = "all-linear"
_HEAD = "get_output_embeddings"


def select(
    names: Sequence[str], targets: str | Sequence[str], exclude: str | Sequence[str] = (), *, field: str = "targets"
) -> list[str]:
    """The names that `targets` means and `exclude` does not, in order.

    A list matches whole names or suffixes at a dot, a string is a regular expression for whole names. Raises
    `TargetError` naming every entry that hits nothing, with the nearest names there are.
    """
    require_hits(names, targets, field)
    require_hits(names, exclude, "exclude")
    kept = meant(targets, names) - meant(exclude, names)
    return [name for name in names if name in kept]


def require_hits(names: Iterable[str], entries: str | Sequence[str], field: str) -> None:
    """Raise `TargetError` unless every entry hits one of `names`."""
    names = list(names)
    if isinstance(entries, str):
        if not meant(entries, names):
            raise TargetError(
                f"{field}={entries!r} as a regular expression matches no whole name among: {_sample(names)}",
                field=field,
            )
        return
    there = {ending for name in names for ending in endings(name)}
    if missed := [entry for entry in entries if entry not in there]:
        tails = sorted({name.rpartition(".")[2] for name in names} | set(names))
        hints = [f"{entry!r}{_near(entry, tails)}" for entry in missed]
        raise TargetError(f"{field}: no name ends in {', '.join(hints)}. There are: {_sample(names)}", field=field)


def require_patterns(names: Iterable[str], patterns: Iterable[str], field: str) -> None:
    """Raise `TargetError` unless every key of a rank or alpha pattern hits one of the adapted names."""
    names = list(names)
    if missed := Patterns(patterns).idle(names):
        raise TargetError(
            f"{field}: {', '.join(map(repr, missed))} hits none of the adapted sites: {_sample(names)}", field=field
        )


def in_layers(name: str, layers: Sequence[int] | None) -> bool:
    """PEFT's `layers_to_transform`: the first number between dots in the name is one of `layers` (a later
    one counts experts).
    """
    if layers is None:
        return True
    found = re.match(r".*?\.[^.]*\.(\d+)\.", f"..{name}.")
    return found is not None and int(found.group(1)) in layers


def output_heads(model: nn.Module) -> dict[str, str]:
    """Names of the linear maps that make the output, with the reason: what "all-linear" leaves alone.

    That is `get_output_embeddings()`, and for a `transformers` model with a task head all that lies outside its base
    model; of `model` itself and of every such model inside it.
    """
    heads: dict[str, str] = {}
    for name, module in modules(model):
        # past nn.Module.__getattr__, which takes long to say that there is none
        if callable(module.__dict__.get(_HEAD, getattr(type(module), _HEAD, None))):
            start = f"{name}." if name else ""
            heads |= {start + local: reason for local, reason in _heads_of(module).items()}
    return heads


def _heads_of(model: nn.Module) -> dict[str, str]:
    heads: dict[str, str] = {}
    inner = getattr(model, "base_model", None)
    prefix = getattr(model, "base_model_prefix", "")
    if isinstance(inner, nn.Module) and inner is not model and prefix and getattr(model, prefix, None) is inner:
        for name, _ in modules(model):
            if name and name != prefix and not name.startswith(f"{prefix}."):
                heads[name] = "output head: outside the base model"
    output = model.get_output_embeddings()  # type: ignore[operator]
    if isinstance(output, nn.Module):
        heads |= {name: "output head" for name, module in modules(model) if module is output}
    return heads


def is_router(model: nn.Module, host: str) -> bool:
    """A mixture's router: named gate or router beside (or over) a child called experts, or of a class called so."""
    parent, _, own = host.rpartition(".")
    if own in ("gate", "router", "wg") and any(
        "experts" in name for name, _ in submodule(model, parent).named_children()
    ):
        return True
    return type(submodule(model, host)).__name__.lower().endswith(("router", "topkgate"))


def _near(entry: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(entry, names, n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _sample(names: Sequence[str]) -> str:
    shapes = list(dict.fromkeys(re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name) for name in names))
    return ", ".join(shapes[:12]) + (f", … ({len(shapes)} in all)" if len(shapes) > 12 else "") if shapes else "(none)"
