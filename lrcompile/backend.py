"""The Dynamo backend: `torch.compile(model, backend="lrcompile")`.

The training passes rewrite the graph that Dynamo captured, and the bodies of checkpoints in it; an inner compiler
(Inductor) does the rest. Graphs without adapters pass through as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from lrcompile.duplicating import duplicate
from lrcompile.errors import SpecError
from lrcompile.lowered.constants import WithConstants
from lrcompile.passes.base import Pass, Result
from lrcompile.passes.captured import bodies
from lrcompile.passes.hoist_constants import constants
from lrcompile.passes.train import train

log = logging.getLogger(__name__)

Compiled = Callable[..., Any]


def lrcompile(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    record: Callable[[Pass, Result], None] | None = None,
) -> Compiled:
    """Rewrite a copy of `graph` and compile it. `mode` and `options` are Inductor's; the option `inner` is another
    Dynamo backend to hand over to, or its name (`aot_eager`, say), which then receives no mode and no other option.
    `record` is told what each pass did.

    Raises SpecError for an inner compiler that does not exist, or that is this one.
    """
    options = dict(options or {})
    inner = options.pop("inner", "inductor")
    graph = duplicate(graph)
    for each in train():
        for subject in [graph] if each.whole else bodies(graph):
            result = each.apply(subject)
            if record is not None:
                record(each, result)
            for refusal in result.refusals:
                log.info("%s left %s as it is: %s", each, refusal.node, refusal.reason)
            if result.modified:
                log.info("%s rewrote %d", each, result.count)
    added = constants(graph)
    compiled = _inner(inner, mode, options)(graph, [*example_inputs, *(each.example for each in added)])
    return WithConstants(compiled, added) if added else compiled


def _inner(name: str | Compiled, mode: str | None, options: dict[str, Any]) -> Compiled:
    if name == "inductor":
        return torch._TorchCompileInductorWrapper(mode, options, None)
    if callable(name) and not (mode or options):
        return name
    known = torch.compiler.list_backends(exclude_tags=None)
    if name not in known or name == "lrcompile":
        others = ", ".join(sorted(set(known) - {"lrcompile"}))
        raise SpecError(f"inner compiler {name!r} is not known; choose one of {others}", field="inner")
    if mode or options:
        raise SpecError(f"mode and options are for Inductor; the inner compiler is {name!r}", field="inner")
    return torch._dynamo.lookup_backend(name)
