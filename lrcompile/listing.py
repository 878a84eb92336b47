"""`lrcompile methods` and `lrcompile passes`: the registries as tables."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import fields

from lrcompile.recipes import methods, recipe
from lrcompile.tables import render


def list_methods(given: Namespace) -> int:
    """One line a method; imports no torch."""
    rows = []
    for name in methods():
        each = recipe(name)
        own = ", ".join(f"{key}={option.default!r}" for key, option in each.options.items())
        rows.append((name, each.summary, each.trains, own or "-", each.paper))
    note = (
        "every method also takes the common fields of lrcompile.spec: rank, alpha, dropout, targets, exclude, layers, …"
    )
    print(render(("method", "what it does", "trains", "own fields", "paper"), rows, notes=[note]))
    return 0


def list_passes(given: Namespace) -> int:
    """One line a pass: the identity it uses, its options, what it preserves."""
    from lrcompile import passes

    rows = []
    for name in passes.names():
        each = passes.get(name)
        options = ", ".join(f"{field.name.replace('_', '-')}={field.default!r}" for field in fields(each))
        rows.append((name, each.preserves, options or "-", (each.__doc__ or "").strip().splitlines()[0]))
    note = 'write a pipeline as "merge-lora,quantize-nf4{block-size=128}"'
    print(render(("pass", "preserves", "options", "identity"), rows, notes=[note]))
    return 0
