"""Sites: every use of a weight as a linear map that an adapter could act on, and why some cannot be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from lrcompile.hosting import Host
from lrcompile.names import submodule
from lrcompile.sites import attention, embedding, experts, graph, linear, parameter
from lrcompile.sites.bypass import refusal_below
from lrcompile.sites.site import Site, Slot

ADAPTERS = "lrcompile_adapters"
"""Attribute under which a host keeps its adapter sets, by slot."""

KINDS = (graph, attention, experts, linear, embedding, parameter)
"""First match wins: from the most particular to the most general."""


def find(model: nn.Module) -> list[Site]:
    """Every site of `model` in module order, those that cannot be adapted included (with their `refusal`)."""
    sites: list[Site] = []
    aliases = _aliases(model)
    graphs: dict[str, set[str]] = {}
    opaque: dict[str, str] = {}
    for host, module in model.named_modules():
        if reason := refusal_below(module):
            opaque[f"{host}." if host else ""] = reason
        if ADAPTERS in host.split(".") or any(_is_read(host, *each) for each in graphs.items()):
            continue
        for kind in KINDS:
            slots = kind.slots(module)
            if slots is None:
                continue
            if reason := next((why for prefix, why in opaque.items() if host.startswith(prefix)), None):
                slots = [replace(slot, refusal=slot.refusal or reason) for slot in slots]
            sites += _named(kind.NAME, host, slots, aliases.get(id(module), ()))
            if kind is graph:
                graphs[f"{host}." if host else ""] = graph.called(module)
            break
    return sites


def _is_read(host: str, graph: str, called: set[str]) -> bool:
    """Does `host` only hold what the graph module of this prefix reads, without ever being called?"""
    parts = host.removeprefix(graph).split(".")
    return host.startswith(graph) and not any(".".join(parts[:end]) in called for end in range(1, len(parts) + 1))


def _named(kind: str, host: str, slots: list[Slot], aliases: tuple[str, ...]) -> Iterator[Site]:
    for slot in slots:
        owner, _, local = slot.name.rpartition(".")
        base = ".".join(part for part in (host, owner) if part)
        graph_root = host if kind == "graph" else None
        names = [_site_name(base, local), *(_site_name(alias, local) for alias in aliases)]
        yield Site(
            name=names[0],
            kind=slot.kind or kind,
            host=base,
            slot=local,
            in_features=slot.in_features,
            out_features=slot.out_features,
            copies=slot.copies,
            transposed=slot.transposed,
            refusal=slot.refusal,
            aliases=tuple(names[1:]),
            form=slot.form,
            graph=graph_root,
        )


def _site_name(host: str, slot: str) -> str:
    if slot == "weight":
        return host
    return f"{host}.{slot}" if host else slot


def _aliases(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """The further names of modules registered more than once."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return {key: tuple(found[1:]) for key, found in names.items() if len(found) > 1}


def host_mixin(site: Site) -> type[Host] | None:
    """What a host's class is swapped for; None where the graph itself is rewritten."""
    return next(kind for kind in KINDS if site.kind in getattr(kind, "KINDS", (kind.NAME,))).HOST


def weight_of(model: nn.Module, site: Site) -> torch.Tensor:
    """A view of the site's weight as `[..., out, in]`, through which it can be written."""
    weight = getattr(submodule(model, site.host), site.slot)
    return weight.mT if site.transposed else weight
