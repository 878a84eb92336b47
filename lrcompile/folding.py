"""Folding adapters into one weight and its bias: W' = cast(W + Δ), float or NF4, and what rounding took of Δ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lrcompile.effects import Effect, effect
from lrcompile.errors import MergeError
from lrcompile.held import Held, put
from lrcompile.kernels.nf4_dequant import Nf4, dequantize_nf4, quantize_nf4
from lrcompile.nf4.modules import Layout, codes_of, is_nf4, layout_of
from lrcompile.nf4.rounding import rounded_for_outputs
from lrcompile.quantizing import base_of
from lrcompile.recipes.forms.adapter import Adapter
from lrcompile.sites.site import Site
from lrcompile.state import State, adapter_set
from lrcompile.walking import submodule


@dataclass(frozen=True)
class FoldedSite:
    """What folding made of one weight or bias."""

    name: str
    dtype: str
    relative_size: float
    """‖Δ‖ / ‖W‖."""
    kept: Effect
    """Of Δ, in what W' − W is."""
    measured_on: str = "weights"
    """Or "outputs": of X·Δᵀ, X what came in on the calibration data."""
    plain: Effect | None = None
    """The same had the codes of W + Δ been those nearest to it element by element; where they were optimised."""

    @property
    def adapter_relative_error(self) -> float:
        """‖(W' − W) − Δ‖ / ‖Δ‖, or that of the outputs: what rounding took of the update; 0 where Δ is 0."""
        return self.kept.error


def fold(
    model: nn.Module,
    state: State,
    site: Site,
    names: Sequence[str],
    into: str,
    owners: dict[int, list[str]],
    moments: Tensor | None = None,
    optimise: bool = False,
) -> list[FoldedSite]:
    """Fold the adapters `names` into the weight of `site` and the bias beside it, keep what they held in `state.folds`,
    and say what it cost, for each of the two that changes.

    `owners`: every name each parameter goes by; one that others hold too gets a parameter of its own here. `moments`:
    second moments of the site's inputs, where the cost is to be that of its outputs; with `optimise` NF4 codes are
    chosen by them. Raises `MergeError` for an update that is not finite; nothing has changed then.
    """
    host = submodule(model, site.host)
    asked = moments if optimise else None
    before, new = _folded_nf4(host, into, asked) if is_nf4(host) else (getattr(host, site.slot), None)
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
        meant = start + delta
        folded = meant.to(dtype)
        held = Held(data=folded)
        if new is not None and new.requantize is not None:
            held = Held(codes=(new.requantize(folded), new.layout))
            folded = _values(held.codes[0], new.layout)  # type: ignore[index]

        def kept(after: Tensor) -> Effect:
            made = after.double() - before.double()
            return effect(*((made.mT, delta.mT) if site.transposed else (made, delta)), moments)

        plain = None
        if asked is not None and new is not None:
            nearest = quantize_nf4(meant, new.layout.block_size, new.double_quant)
            plain = kept(_values(nearest, new.layout))
        row = FoldedSite(
            site.name,
            into if new is not None else _named(folded),
            _relative_size(delta, before),
            kept(folded),
            "weights" if moments is None else "outputs",
            plain,
        )
    kept_here = state.folds[site.name] = put(host, site.slot, held, _others(host, site.slot, site.parameter, owners))
    if bias is None or shift is None:
        return [row]
    name = f"{site.host}.bias" if site.host else "bias"
    moved = (bias.detach().to(wide) + shift).to(bias.dtype)
    made = effect(moved.double() - bias.detach().double(), shift)
    state.trained.hide(name, bias.data)
    beside = FoldedSite(name, _named(moved), _relative_size(shift, bias.detach()), made)
    kept_here.bias = put(host, "bias", Held(data=moved), _others(host, "bias", name, owners))
    return [row, beside]


def _named(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _relative_size(delta: Tensor, before: Tensor) -> float:
    size, weight = float(delta.double().norm()), float(before.double().norm())
    return size / weight if weight > 0 else float("inf") if size > 0 else 0.0


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
    double_quant: bool
    requantize: Callable[[Tensor], Nf4] | None = None


def _folded_nf4(host: nn.Module, into: str, moments: Tensor | None) -> tuple[Tensor, _FromCodes]:
    nf4, layout = codes_of(host), layout_of(host)
    values, double = _values(nf4, layout), nf4.absmax_scale is not None
    if into != "nf4":
        return values, _FromCodes(values, getattr(torch, into), layout, double)
    if moments is not None:

        def chosen(W: Tensor) -> Nf4:
            return rounded_for_outputs(W.mT if layout.transposed else W, nf4, layout, moments)

        return values, _FromCodes(values, torch.float32, layout, double, chosen)
    base = base_of(host)
    assert base is not None  # `_check_into` asked
    start = base.detach().to(values.device, torch.float32)
    return values, _FromCodes(
        start, torch.float32, layout, double, lambda W: quantize_nf4(W, layout.block_size, double)
    )


def _values(nf4: Nf4, layout: Layout) -> Tensor:
    return dequantize_nf4(nf4, layout.shape, layout.block_size)
