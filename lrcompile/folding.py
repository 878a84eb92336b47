"""Folding adapters into one weight and its bias: W' = cast(W + Δ), float or NF4, and what rounding took of Δ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lrcompile.errors import MergeError
from lrcompile.held import Held, put
from lrcompile.kernels.nf4_dequant import Nf4, dequantize_nf4, quantize_nf4
from lrcompile.nf4.modules import Layout, codes_of, is_nf4, layout_of
from lrcompile.quantizing import base_of
from lrcompile.recipes.forms.adapter import Adapter
from lrcompile.sites.site import Site
from lrcompile.state import State, adapter_set
from lrcompile.walking import submodule


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
) -> list[FoldedSite]:
    """Fold the adapters `names` into the weight of `site` and the bias beside it, keep what they held in `state.folds`,
    and say what it cost, for each of the two that changes.

    `owners`: every name each parameter goes by; one that others hold too gets a parameter of its own here. Raises
    `MergeError` for an update that is not finite; nothing has changed then.
    """
    host = submodule(model, site.host)
    before, new = _folded_nf4(host, into) if is_nf4(host) else (getattr(host, site.slot), None)
    assert before is not None
    dtype = before.dtype if new is None else new.dtype
    wide = torch.promote_types(before.dtype, torch.float32)
    bias = bias_of(host, site)
    with torch.no_grad():
        start = (before if new is None else new.start).to(wide)
        adapters = adapter_set(model, site)
        acting = [adapters[name] for name in names if name in adapters]
        delta, shift = changes(acting, start.mT if site.transposed else start, None if bias is None else bias.to(wide))
        if not all(each is None or bool(torch.isfinite(each).all()) for each in (delta, shift)):
            raise MergeError(f"the update at {site.name!r} holds values that are not finite; it was not merged")
        delta = delta.mT if site.transposed else delta
        folded = (start + delta).to(dtype)
        held = Held(data=folded)
        if new is not None and new.requantize is not None:
            held = Held(codes=new.requantize(folded))
            folded = dequantize_nf4(held.codes[0], folded.shape, new.layout.block_size)  # type: ignore[index]
        rows = [_measure(site.name, before, folded, delta, into if new is not None else None)]
    kept = state.folds[site.name] = put(host, site.slot, held, _others(host, site.slot, site.parameter, owners))
    if bias is not None and shift is not None:
        name = f"{site.host}.bias" if site.host else "bias"
        moved = (bias.detach().to(wide) + shift).to(bias.dtype)
        rows.append(_measure(name, bias.detach(), moved, shift, None))
        state.trained.hide(name, bias.data)
        kept.bias = put(host, "bias", Held(data=moved), _others(host, "bias", name, owners))
    return rows


def changes(adapters: Sequence[Adapter], base: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What the adapters, one after the other, add to a weight `[..., out, in]` and to a bias; None where that stays."""
    delta, shift = torch.zeros_like(base), None
    for adapter in adapters:
        if bias is not None:
            more = adapter.bias_change(bias if shift is None else bias + shift, bias, base)
            if more is not None:
                shift = more if shift is None else shift + more
        delta += adapter.change(base + delta, base)
    return delta, shift


def bias_of(host: nn.Module, site: Site) -> nn.Parameter | None:
    """The bias beside the weight of a linear layer, which a form may change with it."""
    return host._parameters.get("bias") if site.kind in ("linear", "conv1d") else None


def _others(host: nn.Module, slot: str, name: str, owners: dict[int, list[str]]) -> list[str]:
    return [other for other in owners.get(id(host._parameters.get(slot)), ()) if other != name]


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
