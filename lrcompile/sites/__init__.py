"""Sites: every use of a weight as a linear map that an adapter could act on, and why some cannot be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import nn

from lrcompile.adapters import ADAPTERS as ADAPTERS
from lrcompile.hosting import Host
from lrcompile.names import beginnings
from lrcompile.sites import attention, embedding, experts, graph, linear, parameter
from lrcompile.sites.bypass import refusal_below
from lrcompile.sites.site import Site, Slot
from lrcompile.walking import every_name, submodule

KINDS = (graph, attention, experts, linear, embedding, parameter)
"""First match wins: from the most particular to the most general."""


def find(model: nn.Module) -> list[Site]:
    """Every site of `model` in module order, those that cannot be adapted included (with their `refusal`)."""
    sites: list[Site] = []
    graphs: dict[str, set[str]] = {}
    opaque: dict[str, str] = {}
    for module, (host, *aliases) in every_name(model).items():
        if reason := refusal_below(module):
            opaque[host] = reason
        above = ["", *beginnings(host)][:-1] if opaque or graphs else []  # a root is above itself
        if any(_is_read(host, graph, graphs[graph]) for graph in above if graph in graphs):
            continue
        for kind in KINDS:
            slots = kind.slots(module)
            if slots is None:
                continue
            if reason := next((opaque[each] for each in above if each in opaque), None):
                slots = [replace(slot, refusal=slot.refusal or reason) for slot in slots]
            sites += _named(kind.NAME, host, slots, aliases)
            if kind is graph:
                graphs[host] = graph.called(module)
            break
    return sites


def _is_read(host: str, graph: str, called: set[str]) -> bool:
    """Does `host` only hold what the graph module above it reads, without ever being called?"""
    return called.isdisjoint(beginnings(host.removeprefix(f"{graph}." if graph else "")))


def _named(kind: str, host: str, slots: list[Slot], aliases: Iterable[str]) -> Iterator[Site]:
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


def host_mixin(site: Site) -> type[Host] | None:
    """What a host's class is swapped for; None where the graph itself is rewritten."""
    return next(kind for kind in KINDS if site.kind in getattr(kind, "KINDS", (kind.NAME,))).HOST


def weight_of(model: nn.Module, site: Site) -> torch.Tensor:
    """A view of the site's weight as `[..., out, in]`, through which it can be written."""
    weight = getattr(submodule(model, site.host), site.slot)
    return weight.mT if site.transposed else weight
