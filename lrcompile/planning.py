"""`plan`: what `apply` would do, without doing it, and what a training step would then cost. Works on the meta device.

With T tokens a step, a frozen map of i inputs and o outputs, and an adapter of rank r on it:

    FLOPs    2·T·i·o forward, 2·T·i·o for the gradient of its input, and the adapter's own, 6·T·r·(i + o) for LoRA
    memory   the weights, what the adapter keeps for the backward pass (4·T·(i + r) bytes for LoRA), and of every number
             that trains its value, its gradient and two of AdamW's averages

The adapter's are counted by running its operations on the meta device.
Attention scores, norms and element-wise operations are not counted: they depend on the sequence length or cost little.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from lrcompile import walking
from lrcompile.costing import Cost, cost
from lrcompile.matching import match
from lrcompile.recipes import recipe
from lrcompile.recipes.recipe import part
from lrcompile.sites.site import Site
from lrcompile.specs import Spec
from lrcompile.tables import render
from lrcompile.wording import sized

ADAMW_STATES = 2


@dataclass(frozen=True)
class Planned:
    """One site: adapted with `rank`, or left alone for `reason`."""

    name: str
    kind: str
    in_features: int
    out_features: int
    copies: int
    rank: int | None
    parameters: int
    reason: str


@dataclass(frozen=True)
class Plan:
    """What `apply(model, spec)` would do. Bytes and FLOPs are those of one step of `tokens` tokens with AdamW."""

    method: str
    sites: tuple[Planned, ...]
    trained_in_full: tuple[str, ...]
    trainable: int
    total: int
    """Numbers of the model before the adapters."""
    tokens: int
    base_bytes: int
    trainer_bytes: int
    """Values, gradients and optimizer states of everything that trains."""
    saved_bytes: int
    """At most: sites that share an input share what is saved of it."""
    frozen_flops: int
    adapter_flops: int
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        hit = [site for site in self.sites if site.rank is not None]
        rows = [
            (
                s.name,
                s.kind,
                s.in_features,
                s.out_features,
                "-" if s.rank is None else s.rank,
                f"{s.parameters:,}",
                s.reason,
            )
            for s in self.sites
        ]
        flops = self.frozen_flops + self.adapter_flops
        total = self.base_bytes + self.trainer_bytes + self.saved_bytes
        title = (
            f"{self.method}: {len(hit)} sites hit, {len(self.sites) - len(hit)} spared · "
            f"trains {self.trainable:,} numbers beside {self.total:,} ({self.trainable / max(self.total, 1):.3%})"
        )
        step = (
            f"a step of {self.tokens:,} tokens: {sized(total)} = weights {sized(self.base_bytes)} + "
            f"trained numbers, gradients and AdamW {sized(self.trainer_bytes)} + "
            f"saved for the adapters at most {sized(self.saved_bytes)}",
            f"a step of {self.tokens:,} tokens: "
            f"{flops / 1e9:,.1f} GFLOP in linear maps, of which the adapters {self.adapter_flops / max(flops, 1):.1%}",
        )
        full = (f"trained in full: {', '.join(self.trained_in_full)}",) if self.trained_in_full else ()
        columns = ("site", "kind", "in", "out", "rank", "added", "why not")
        return render(columns, rows, title=title, notes=(*step, *full, *self.notes))


def plan(model: nn.Module, spec: Spec, *, tokens: int = 2048) -> Plan:
    """The sites `spec` hits and spares in `model`, and the predicted cost of a step of `tokens` tokens; changes
    nothing.

    `model` may live on the meta device. Raises `SpecError` and `TargetError` exactly where `apply` would.
    """
    matched = match(model, spec)
    expert_share = _expert_share(model)
    planned = [_planned(site, spec) for site in matched.hit]
    costs = _costs(model, spec, matched.hit, tokens, expert_share)
    parameters = dict(walking.parameters(model))
    in_full = sum(parameters[name].numel() for name in matched.trained)
    added = sum(site.parameters for site in planned)
    width = _width(spec, parameters.values())
    full_bytes = sum(parameters[name].numel() * parameters[name].element_size() for name in matched.trained)
    everywhere = [*matched.hit, *(site for site, _ in matched.spared)]
    maps = [site for site in everywhere if site.form != "lookup"]
    return Plan(
        method=spec.method,
        sites=(*planned, *(_spared(site, why) for site, why in matched.spared)),
        trained_in_full=matched.trained,
        trainable=added + in_full,
        total=sum(parameter.numel() for parameter in parameters.values()),
        tokens=tokens,
        base_bytes=_base_bytes(parameters, spec, matched.hit),
        trainer_bytes=(2 + ADAMW_STATES) * added * width + (1 + ADAMW_STATES) * full_bytes,
        saved_bytes=sum(cost.saved_bytes for cost in costs),
        frozen_flops=sum(
            round(4 * tokens * _used(site, expert_share)) * site.in_features * site.out_features for site in maps
        ),
        adapter_flops=sum(cost.flops for cost in costs),
        notes=matched.notes,
    )


def _costs(model: nn.Module, spec: Spec, hit: Iterable[Site], tokens: int, expert_share: float) -> list[Cost]:
    """The cost of every site; sites of one shape cost the same."""
    known: dict[Hashable, Cost] = {}
    found = []
    for site in hit:
        weight = walking.submodule(model, site.host)._parameters.get(site.slot)
        dtype = weight.dtype if weight is not None else torch.float32
        rows = round(tokens * _used(site, expert_share))
        form = part(str(recipe(spec.method).form)).at(spec, site)
        key = (form, site.in_features, site.out_features, spec.rank_of(site.name), dtype, rows)
        if key not in known:
            known[key] = cost(spec, site, rows, dtype)
        found.append(known[key])
    return found


def _planned(site: Site, spec: Spec) -> Planned:
    copies, rank, method = site.copies or 1, spec.rank_of(site.name), recipe(spec.method)
    assert method.form is not None  # a method without one hits no site
    shapes = part(method.form).at(spec, site).shapes(site.in_features, site.out_features, rank)
    added = copies * sum(math.prod(shape) for name, shape in shapes.items() if name in method.trains)
    return Planned(site.name, site.kind, site.in_features, site.out_features, copies, rank, added, "")


def _spared(site: Site, why: str) -> Planned:
    return Planned(site.name, site.kind, site.in_features, site.out_features, site.copies or 1, None, 0, why)


def _width(spec: Spec, parameters: Iterable[torch.Tensor]) -> int:
    """Bytes of an adapter's number: the spec's dtype, else float32 or the base's if that is wider."""
    if spec.dtype is not None:
        return getattr(torch, spec.dtype).itemsize
    return max([4, *(parameter.element_size() for parameter in parameters if parameter.is_floating_point())])


def _base_bytes(parameters: dict[str, nn.Parameter], spec: Spec, hit: Iterable[Site]) -> int:
    whole = sum(parameter.numel() * parameter.element_size() for parameter in parameters.values())
    method = recipe(spec.method)
    form = part(method.form) if method.form is not None else None
    for site in hit:
        weight = parameters.get(site.parameter)
        if weight is not None and form is not None and form.holds_weight:
            whole += form.held_bytes(spec, site) - weight.numel() * weight.element_size()
        elif weight is not None and method.quantizes_base:
            numbers = weight.numel()
            blocks = -(-numbers // spec.block_size)
            maxima = blocks + 4 * (-(-blocks // 256)) + 4 if spec.double_quant else 4 * blocks
            whole += -(-numbers // 2) + maxima - numbers * weight.element_size()
    return whole


def _expert_share(model: nn.Module) -> float:
    """Share of its experts that a token visits, as the model's config says; 1 where it does not."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    chosen = getattr(config, "num_experts_per_tok", None)
    count = next((n for n in (getattr(config, key, None) for key in _EXPERT_COUNTS) if n), None)
    return chosen / count if isinstance(chosen, int) and isinstance(count, int) else 1.0


_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")


def _used(site: Site, expert_share: float) -> float:
    """How many of a site's copies a token goes through."""
    return 1.0 if site.copies is None else site.copies * expert_share
