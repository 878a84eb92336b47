"""What a merge may do: its arguments held against the model, and what it says where it may not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from lrcompile.errors import MergeError
from lrcompile.merge_report import MergeReport
from lrcompile.nf4.modules import is_nf4, layout_of
from lrcompile.quantizing import base_of
from lrcompile.sites.site import Site
from lrcompile.state import State, require_name
from lrcompile.walking import submodule

LIMIT = 0.5
"""Largest ‖(W' − W) − Δ‖/‖Δ‖ a merge accepts where nothing else is asked for.

Rounding a weight to a unit roundoff u leaves an error of about 0.43·u·‖W‖, whatever Δ is, so a half is reached at
‖Δ‖/‖W‖ = 0.34 % in bfloat16 (u = 2⁻⁸) and 0.04 % in float16 (2⁻¹¹). Below that the error is no noise beside the update
any more: elements smaller than half a step round away, and at 0.1 % in bfloat16 half of the update is gone.
"""

INTO = ("keep", "float32", "bfloat16", "float16", "nf4")


def chosen_names(state: State, name: str | None) -> tuple[str, ...]:
    if state.merged:
        raise MergeError(f"{', '.join(map(repr, state.merged))} is merged already; call lrcompile.unmerge(model) first")
    if name is not None:
        require_name(state, name)
        if name not in state.active:
            raise MergeError(f"adapter {name!r} is not active; call lrcompile.activate(model, {name!r}) first")
        return (name,)
    if not state.active:
        raise MergeError("no adapter is active, so there is nothing to merge; call lrcompile.activate first")
    return tuple(state.active)


def check_limit(limit: float) -> None:
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not limit > 0:
        raise MergeError(f"limit is {limit!r}; expected a number above 0, a share of the update (float('inf'): none)")


def check_data(into: str, optimise: bool, data: Iterable[Any] | None) -> None:
    if optimise and into != "nf4":
        raise MergeError(f'optimise=True chooses NF4 codes: it goes with into="nf4", not with into={into!r}')
    if optimise and data is None:
        raise MergeError(
            "optimise=True chooses codes by what layers put out: merge(model, into='nf4', optimise=True, data=batches),"
            " a batch being a dict (model(**batch)) or a tuple (model(*batch)); some thousands of tokens of the task"
        )


def check_into(model: nn.Module, chosen: Sequence[Site], into: str, optimise: bool) -> None:
    if into not in INTO:
        raise MergeError(f"into={into!r} is not valid: choose one of {', '.join(map(repr, INTO))}")
    hosts = {site.name: submodule(model, site.host) for site in chosen}
    quantized = {name: host for name, host in hosts.items() if is_nf4(host)}
    if not quantized:
        if into != "keep":
            raise MergeError(f"into={into!r} is for an NF4 base, and no merged weight is quantized: leave it out")
        return
    name = next(iter(quantized))
    if into == "keep":
        raise MergeError(
            f"{name!r} (of {len(quantized)} such sites) holds NF4 codes, on which a small update would round away:"
            " 2-3 % of it survives."
            ' Keep the pair beside the base (export with adapters="inline": exact), or give into="bfloat16" or'
            ' "float32" (dequantize and fold), or into="nf4" with optimise=True and data=batches (codes chosen for what'
            ' the layers put out), or into="nf4" on a base quantized with keep_base="cpu" (requantizes W + Δ; the loss'
            " is measured)."
        )
    if optimise:
        return
    if into == "nf4":
        if lost := [each for each, host in quantized.items() if base_of(host) is None]:
            raise MergeError(
                f'into="nf4" requantizes from the original weights, and those of {lost[0]!r} were not kept; quantize'
                ' with keep_base="cpu", or give optimise=True and data=batches, which needs only the codes'
            )
        return
    asked = getattr(torch, into)
    if wrong := [each for each, host in quantized.items() if layout_of(host).dtype != asked]:
        dtype = str(layout_of(hosts[wrong[0]]).dtype).removeprefix("torch.")
        raise MergeError(
            f"{wrong[0]!r} computes on {dtype} activations, so a plain {into} weight would not fit them; give"
            f" into={dtype!r}, or cast the model first (model.to(torch.{into}))"
        )


def check_final(state: State, merged: Sequence[str]) -> None:
    if left := [name for name in state.active if name not in merged]:
        raise MergeError(
            f"adapter {left[0]!r} is active but not merged; merge all active adapters, or deactivate it, before"
            " final=True"
        )


def erased_message(report: MergeReport, limit: float) -> str:
    worst = report.worst
    assert worst is not None
    ways = (
        'Fold with into="float32" or "bfloat16", or keep the pair beside the codes (export with adapters="inline":'
        " exact)"
        if worst.dtype == "nf4"
        else "Keep those weights in float32 (merge a float32 copy: model.float()), or keep the pair beside its base"
        ' (export with adapters="inline": exact)'
    )
    accepting = f"or accept it: limit={_accepting(report.adapter_relative_error):g}."
    if report.outputs is not None:
        return (
            f"rounding to {worst.dtype} would take {report.outputs.error:.0%} of what the adapters do to the model's"
            f" outputs on the data (more than {limit:.0%}), and at the worst site, {worst.name!r},"
            f" {worst.adapter_relative_error:.0%} of what they do to the layer's. {ways}, give more data of the task,"
            f" {accepting}"
        )
    erased = [row for row in report.sites if not row.adapter_relative_error <= limit]
    others = [f"{row.name!r} ({row.adapter_relative_error:.0%})" for row in erased if row is not worst]
    listed = f", also at {', '.join(others[:8])}{', …' if others[8:] else ''}" if others else ""
    return (
        f"rounding to {worst.dtype} would take {worst.adapter_relative_error:.0%} of the update at {worst.name!r}"
        f" (more than {limit:.0%} at {len(erased)} sites in all{listed}), whose size is {worst.relative_size:.1e} of"
        f" the weight's. {ways}, {accepting}"
    )


def _accepting(error: float) -> float:
    """A limit of two digits that lets it pass."""
    return math.ceil(error * 100) / 100 if math.isfinite(error) else math.inf
