"""Folding adapters into one weight: W' = cast(W + Σ s·B·A), float or NF4, and what rounding took of the update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lrcompile.errors import MergeError
from lrcompile.held import Fold, Held, exchange, on_host
from lrcompile.kernels.nf4_linear import Nf4, dequantize_nf4, quantize_nf4
from lrcompile.nf4.modules import Layout, codes_of, is_nf4, layout_of
from lrcompile.quantizing import base_of
from lrcompile.sites.site import Site
from lrcompile.state import State, adapter_set


@dataclass(frozen=True)
class FoldedSite:
    name: str
    dtype: str
    relative_size: float
    """‖Δ‖ / ‖W‖."""
    adapter_relative_error: float
    """‖(W' − W) − Δ‖ / ‖Δ‖: what rounding took of the update; 0 where Δ is 0."""


def fold(
    model: nn.Module, state: State, site: Site, names: Sequence[str], into: str, owners: dict[int, list[str]]
) -> FoldedSite:
    """Fold the adapters `names` into the weight of `site`, keep what it held in `state.folds`, and say what it cost.

    `owners`: every name each parameter goes by; a weight that others hold too gets a parameter of its own here. Raises
    `MergeError` for an update that is not finite; nothing has changed then.
    """
    host = model.get_submodule(site.host)
    before, new = _folded_nf4(host, into) if is_nf4(host) else (host._parameters[site.slot], None)
    assert before is not None
    dtype = before.dtype if new is None else new.dtype
    wide = torch.promote_types(before.dtype, torch.float32)
    with torch.no_grad():
        adapters = adapter_set(model, site)
        start = (before if new is None else new.start).to(wide)
        base = start.mT if site.transposed else start
        delta = torch.zeros_like(base)
        for adapter in (adapters[name] for name in names if name in adapters):
            delta += adapter.change(base + delta, base)
        if not torch.isfinite(delta).all():
            raise MergeError(f"the update at {site.name!r} holds values that are not finite; it was not merged")
        delta = delta.mT if site.transposed else delta
        folded = (start + delta).to(dtype)
        held = Held(data=folded)
        if new is not None and new.requantize is not None:
            held = Held(codes=new.requantize(folded))
            folded = dequantize_nf4(held.codes[0], folded.shape, new.layout.block_size)  # type: ignore[index]
        row = _measure(site.name, before, folded, delta, into if new is not None else None)
    others = [other for other in owners.get(id(host._parameters.get(site.slot)), ()) if other != site.parameter]
    if others:
        state.folds[site.name] = Fold(Held(data=before.data), others[0], shared=host._parameters[site.slot])
        host._parameters[site.slot] = nn.Parameter(folded, requires_grad=before.requires_grad)
    else:
        state.folds[site.name] = Fold(on_host(exchange(host, site.slot, held)))
    return row


@dataclass(frozen=True)
class _FromCodes:
    """How an NF4 weight is folded: from which values, into which dtype, and back into which codes."""

    start: Tensor
    dtype: torch.dtype
    layout: Layout
    requantize: Callable[[Tensor], tuple[Nf4, Layout]] | None = None


def _folded_nf4(host: nn.Module, into: str) -> tuple[Tensor, _FromCodes]:
    layout = layout_of(host)
    values = dequantize_nf4(codes_of(host), layout.shape, layout.block_size)
    if into != "nf4":
        return values, _FromCodes(values, getattr(torch, into), layout)
    double = codes_of(host).absmax_scale is not None
    base = base_of(host)
    assert base is not None  # `_check_into` asked
    start = base.detach().to(values.device, torch.float32)
    return values, _FromCodes(
        start, torch.float32, layout, lambda W: (quantize_nf4(W, layout.block_size, double), layout)
    )


def _measure(name: str, before: Tensor, after: Tensor, delta: Tensor, into: str | None) -> FoldedSite:
    wide = delta.double()
    size = wide.norm()
    lost = ((after.double() - before.double()) - wide).norm()
    weight = before.double().norm()
    return FoldedSite(
        name=name,
        dtype=into or str(after.dtype).removeprefix("torch."),
        relative_size=float(size / weight) if weight > 0 else float("inf") if size > 0 else 0.0,
        adapter_relative_error=float(lost / size) if size > 0 else 0.0,
    )
