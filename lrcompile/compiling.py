"""`compile`: torch.compile with our passes, such that what changes while training compiles nothing anew."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from lrcompile import accounts
from lrcompile.blocks import differing_numbers, repeated
from lrcompile.errors import SpecError
from lrcompile.padding import pad
from lrcompile.rewriting import Rewriting
from lrcompile.state import has_state, state_of
from lrcompile.wrapping import within

COMBINATIONS = 64
"""Compiled entries a frame may have: of adapters on and off, of methods, of what trains. Torch's own limit is 8."""


def compile(
    model: nn.Module,
    *,
    max_rank: int | None = None,
    memory_budget: float | None = None,
    regions: str | None = None,
    dynamic: bool | None = True,
    **options: Any,
) -> Any:
    """f ↦ f: the same outputs and gradients as `model`, up to the order of sums, from graphs our passes have rewritten.

    Nothing is compiled again when values change (weights, the scale), when an adapter of the same form and rank takes
    the place of another (`activate`), or when batch or sequence length do (from 2 on; a size of 1 is compiled for
    itself, as in any model). Any other combination (`disabled`, another method or rank, other trainables) is compiled
    once and found again on return; past 64 of them torch falls back to eager with a warning.

    max_rank: factors enter the graph with zeros up to this rank, so that ranks from 1 to it share one graph. That is
    for methods that train a plain pair (lora and what only starts or steps differently, dora, hira), and holds for
    adapters added later too. memory_budget, above 0 and up to 1: the share of what training would keep for its backward
    pass that it may; the rest, adapters' intermediates first of all, is computed again. regions="blocks": each kind of
    repeated block (the children of a list, of one class) is compiled once, in place, and what surrounds them runs
    eagerly, so that compiling takes as long for any depth.

    Further options are those of `torch.compile` (`fullgraph`, `mode`, `options`, …), but for sizes, which are dynamic
    unless `dynamic` says otherwise; `options={"inner": …}` names the backend that compiles what the passes leave,
    Inductor by default.
    Returns what `torch.compile` returns; with regions the model itself. `lrcompile.report(model)` says what the passes
    did. `model` may be wrapped (DistributedDataParallel, fully_shard). Raises `SpecError` for an option out of range,
    `AdapterError` for an active adapter whose rank is above max_rank.
    """
    _check(max_rank, memory_budget, regions)
    model = within(model)
    adapted = next((module for module in model.modules() if has_state(module)), model)
    blocks = repeated(model) if regions else []
    if regions and not blocks:
        raise SpecError(
            f"regions={regions!r}: no list in this {type(model).__name__} holds two blocks of one class; compile it"
            " without regions",
            field="regions",
        )
    if max_rank is not None or has_state(adapted):
        pad(adapted, max_rank)
    backend = Rewriting(options.pop("mode", None), options.pop("options", None), memory_budget)
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        options.setdefault("isolate_recompiles", True)  # else other compilations of the same classes count as ours
    compiled: Any = torch.compile(model, backend=backend, dynamic=dynamic, **options)
    context = getattr(compiled, "dynamo_ctx", None)
    if context is None or options.get("disable"):
        return compiled
    accounts.keep(adapted, backend.graphs)
    numbers = sorted({name for kind in blocks for name in differing_numbers(kind)})
    context.enter_exit_hooks += _switches(_ranks(adapted) if max_rank is not None else (), numbers, dynamic)
    if not regions:
        return compiled
    for kind in blocks:
        for block in kind:
            block._compiled_call_impl = context(block._call_impl)
    return model


def _check(max_rank: int | None, memory_budget: float | None, regions: str | None) -> None:
    if max_rank is not None and (isinstance(max_rank, bool) or not isinstance(max_rank, int) or max_rank < 1):
        raise SpecError(f"max_rank is {max_rank!r}; expected a whole number from 1, or None", field="max_rank")
    number = isinstance(memory_budget, (int, float)) and not isinstance(memory_budget, bool)
    if memory_budget is not None and not (number and 0 < memory_budget <= 1):
        raise SpecError(f"memory_budget is {memory_budget!r}; expected 0 < budget ≤ 1, or None", field="memory_budget")
    if regions not in (None, "blocks"):
        raise SpecError(f"regions is {regions!r}; expected 'blocks' or None", field="regions")


def _ranks(model: nn.Module) -> list[str]:
    """Where Dynamo meets a dimension that is a rank, in the language of `torch.compiler.config.unbacked_sources`.

    Unbacked, so that a rank of 1 is no special case. Before torch 2.13 that language has no dimensions: the widths,
    which the products say again, are then unbacked too.
    """
    from torch._dynamo.variables.builder import is_unbacked_source

    dimensions = "dim" in inspect.signature(is_unbacked_source).parameters
    lists = {site.slot: site.copies is not None for sites in state_of(model).sites.values() for site in sites}
    names = []
    for slot, copies in lists.items():
        owner = rf".*_modules\['{slot}'\]\.live\[\d+\]\._parameters"
        for factor, dimension in (("A", 0 + copies), ("B", 1 + copies)):
            names.append(rf"{owner}\['{factor}'\]" + (f":{dimension}" if dimensions else ""))
    return names


def _switches(ranks: Iterable[str], numbers: Iterable[str], dynamic: bool | None) -> list[Callable[[], Any]]:
    """What is set while a compiled forward runs, and so while it compiles."""
    settings: Any = torch.compiler.config
    varied = [*ranks, *(rf".*\.{name}$" for name in numbers)]
    sources = {"dynamic_sources": varied, "unbacked_sources": ranks}
    given = {key: ",".join(filter(None, [getattr(settings, key), *names])) for key, names in sources.items()}
    tracing: Any = torch._dynamo.config
    fixed = {"recompile_limit": max(tracing.recompile_limit, COMBINATIONS)}
    if dynamic:
        fixed["specialize_float"] = True  # dynamic sizes would make an input of every dropout probability
    switches = [settings._make_closure_patcher(**given), tracing._make_closure_patcher(**fixed)]
    if dynamic:
        import torch.fx.experimental._config as symbols

        # a batch that happens to be as large as the sequence is long says nothing about the next one
        switches.append(symbols._make_closure_patcher(use_duck_shape=False))  # type: ignore[attr-defined]
    return switches
