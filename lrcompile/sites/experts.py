"""The 3-D weights of `transformers`' routed experts: every class under `@use_experts_implementation`, by its flags.

That decorator marks instances with how they store and use their weights (`has_gate`, `has_bias`, `is_transposed`,
`has_post_expert_norm`; the layout of gate and up is known to `_apply_gate`) and dispatches their forward by config.
With a live adapter the arithmetic of that implementation runs here, so each projection is a product, then adapters:

* eager: the classes' own loop over experts that received rows (batched while being captured: no loop over data can be);
* `batched_mm`: one gathered weight a row;
* `grouped_mm`, and any that hides its projections in a kernel: one grouped product over rows sorted by expert.

Experts that are not decorated (Llama 4, JetMoE, LongCat, Step 3) are `parameter`'s to trace or to refuse.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrcompile.errors import AdapterError
from lrcompile.hosting import Host, original_class
from lrcompile.sites.live import any_live, live
from lrcompile.sites.site import Slot

NAME = "experts"
ARGUMENTS = (("hidden_states",), ("top_k_index", "router_indices"), ("top_k_weights", "routing_weights"))
"""What the classes' forwards take, by each of the names they give it."""


class AdaptedExperts(Host):
    """Σ over a token's experts e of w_e · down_e(gate(up_e(x))), each map of the base followed by its live adapters.

    hidden states `[tokens, hidden]`, indices and weights `[tokens, k]`, as the original's forward. An index of
    `num_experts` means no expert. With no live adapter the original runs; a zero update changes no bit of eager's
    result, except where a class's eager loop computes in float32 by itself (its other implementations do not either).
    """

    num_experts: int
    has_gate: bool
    has_bias: bool
    is_transposed: bool
    has_post_expert_norm: bool
    _is_expert_parallel: bool
    config: Any
    act_fn: Callable[[Tensor], Tensor]
    post_expert_norm: Callable[[Tensor], Tensor]
    _apply_gate: Callable[[Tensor], Tensor]

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
        *,
        router_indices: Tensor | None = None,
        routing_weights: Tensor | None = None,
    ) -> Tensor:
        index = router_indices if top_k_index is None else top_k_index
        weights = routing_weights if top_k_weights is None else top_k_weights
        if index is None or weights is None:
            raise AdapterError("experts take hidden states, the indices of each token's experts, and their weights")
        if not any_live(self):  # type: ignore[arg-type]
            return super().forward(hidden_states, index, weights)  # type: ignore[misc]
        implementation = self.config._experts_implementation
        if implementation in (None, "eager") and not torch.compiler.is_compiling():
            return self._looped(hidden_states, index, weights)
        return self._rowwise(hidden_states, index, weights, grouped=implementation not in (None, "eager", "batched_mm"))

    def _looped(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Expert by expert: the rows, their order and the order of sums are those of the classes' own loops."""
        output = torch.zeros_like(hidden)
        for expert in index.unique().tolist():
            if expert >= self.num_experts:
                continue
            position, token = torch.where(index.t() == expert)

            def product(slot: str, x: Tensor, expert: int = expert) -> Tensor:
                weight = getattr(self, slot)[expert]
                y = x @ weight if self.is_transposed else F.linear(x, weight)
                if self.has_bias:
                    y = y + getattr(self, f"{slot}_bias")[expert]
                return self._adapted(slot, y, x, expert)

            y = self._expert(hidden[token], product) * weights[token, position, None]
            output.index_add_(0, token, y.to(output.dtype))
        return output

    def _rowwise(self, hidden: Tensor, index: Tensor, weights: Tensor, *, grouped: bool) -> Tensor:
        """All (token, expert) pairs as rows of one product a projection."""
        experts, weights = index.reshape(-1), weights.reshape(-1)
        order = offsets = absent = None
        x = hidden.repeat_interleave(index.shape[1], dim=0)
        if grouped:
            experts, order = experts.sort()
            x, weights = hidden[order // index.shape[1]], weights[order]
            # Counted by comparing: histc needs floats on some devices, and bincount cannot be captured.
            bounds = torch.arange(self.num_experts, device=experts.device)
            offsets = (experts.unsqueeze(-1) <= bounds).sum(0, dtype=torch.int32)
        known = experts
        if self._is_expert_parallel:
            # Rows of another rank's experts: a grouped product leaves them, and their gradients, uninitialised.
            absent = (experts >= self.num_experts).unsqueeze(-1)
            known = experts.clamp(max=self.num_experts - 1)
            x = x.masked_fill(absent, 0.0)

        def product(slot: str, x: Tensor) -> Tensor:
            weight = getattr(self, slot)
            y = self._grouped(x, weight, offsets) if offsets is not None else self._gathered(x, weight[known])
            if self.has_bias:
                y = y + getattr(self, f"{slot}_bias")[known]
            if absent is not None:
                y = y.masked_fill(absent, 0.0)
            return self._adapted(slot, y, x, experts)

        y = self._expert(x, product) * weights.unsqueeze(-1)
        if order is not None:
            y = y[order.argsort()]
        return y.unflatten(0, index.shape).sum(dim=1).to(hidden.dtype)

    def _expert(self, x: Tensor, product: Callable[[str, Tensor], Tensor]) -> Tensor:
        """One expert's two maps and what lies between and after."""
        y = self._apply_gate(product("gate_up_proj", x)) if self.has_gate else self.act_fn(product("up_proj", x))
        y = product("down_proj", y)
        return self.post_expert_norm(y) if self.has_post_expert_norm else y

    def _adapted(self, slot: str, y: Tensor, x: Tensor, experts: Tensor | int) -> Tensor:
        for adapter in live(self, slot):  # type: ignore[arg-type]
            y = adapter.experts(y, x, experts)
        return y

    def _gathered(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.is_transposed:
            return torch.bmm(x.unsqueeze(1), weight).squeeze(1)
        return torch.bmm(weight, x.unsqueeze(-1)).squeeze(-1)

    def _grouped(self, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        """By transformers' own dispatch, which knows the devices and dtypes that have a kernel."""
        integration: Any = sys.modules["transformers.integrations.moe"]
        return integration._grouped_linear(x, weight, offsets, is_transposed=self.is_transposed)


HOST = AdaptedExperts


def slots(module: nn.Module) -> list[Slot] | None:
    forward = _written_forward(module)
    if forward is None or "experts_interface" not in forward.__code__.co_freevars:
        return None
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    return [_slot(module, forward, name) for name in names]


def _slot(module: nn.Module, forward: Callable, name: str) -> Slot:
    cls = original_class(module).__name__
    weight = module._parameters.get(name)
    takes = list(inspect.signature(forward).parameters)[1:]
    if weight is None or weight.dim() != 3:
        return Slot(name, refusal=f"{cls} does not hold it as one 3-dimensional parameter")
    if not weight.is_floating_point() or weight.element_size() == 1:
        return Slot(name, refusal=f"{cls} holds it as {weight.dtype}, to which no update can be added")
    if len(takes) != 3 or any(given not in known for given, known in zip(takes, ARGUMENTS, strict=True)):
        return Slot(name, refusal=f"{cls}.forward takes {', '.join(takes)}; expected states, indices and weights")
    experts, rows, columns = weight.shape
    if module.is_transposed:
        return Slot(name, rows, columns, experts, transposed=True)
    return Slot(name, columns, rows, experts)


def _written_forward(module: nn.Module) -> Any:
    """The forward that runs below the classes generated here; None where it was replaced on the instance."""
    if "forward" in module.__dict__:
        return None
    for cls in type(module).__mro__:
        if "forward" in cls.__dict__ and not issubclass(cls, Host):
            return cls.__dict__["forward"] if inspect.isfunction(cls.__dict__["forward"]) else None
    return None
