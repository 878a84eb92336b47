"""LoRA that can say how much it adds to its site's output, and share its factors with other sites."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrcompile.errors import AdapterError
from lrcompile.recipes.forms.adapter import Adapter
from lrcompile.recipes.forms.pair import LoraAdapter
from lrcompile.sites.site import Site
from lrcompile.specs import Spec

WAITING, MEASURING, KEPT, SHARED = range(4)
"""Phases of a site: before it is measured, while it is, and what became of it."""

Pairs = dict[Hashable, tuple[nn.Parameter, nn.Parameter]]


class MeasuredLora(LoraAdapter):
    """Δ = s·B·A  (arXiv 2402.07721): A `[rank, in]`, B `[out, rank]`, of its own or those of all `SHARED` sites of its
    kind.

    While measuring, `energy` (0-d float64) sums g = Σ‖s·B·A·x‖² over the inputs x of training, before dropout. What it
    takes is S = xAᵀ `[tokens, rank]` only, g = s²·tr(S(BᵀB)Sᵀ); a stack of experts forms its output. `phase` is a 0-d
    integer; both are in checkpoints, so that a resumed run knows where it is.
    """

    uses = frozenset({"product", "rows", "experts", "lookup"})
    energy: Tensor
    phase: Tensor

    def __init__(self, *sizes: Any, device: torch.device | str | None = None, **options: Any):
        super().__init__(*sizes, device=device, **options)
        self.register_buffer("energy", torch.zeros((), dtype=torch.float64, device=device))
        self.register_buffer("phase", torch.zeros((), dtype=torch.uint8, device=device))
        self.stage, self.projection, self.pairs = WAITING, "", cast(Pairs, {})

    @classmethod
    def share(cls, spec: Spec, sites: Sequence[Site], *, dtype: torch.dtype, device: torch.device) -> Pairs:
        return {}

    @classmethod
    def build(cls, spec: Spec, site: Site, shared: Any, *, dtype: torch.dtype, device: torch.device) -> Adapter:
        adapter = cast(MeasuredLora, super().build(spec, site, shared, dtype=dtype, device=device))
        adapter.projection = projection(site.name)
        adapter.pairs = shared
        return adapter

    @property
    def kind(self) -> Hashable:
        """Sites of one kind can share a pair: projections of one name, shape, dtype and device."""
        return self.projection, self.A.shape, self.B.shape, self.A.dtype, self.A.device

    def enter(self, phase: int) -> None:
        self.phase.fill_(phase)
        self.refresh()

    def refresh(self) -> None:
        if self.phase.is_meta:
            return
        before, phase = self.stage, int(self.phase)
        if phase > SHARED:
            raise AdapterError(f"a site of lora-drop is in phase {phase}; there are {WAITING} to {SHARED}")
        self.stage = phase
        if phase == SHARED:
            self._join()
        elif before == SHARED:
            self._leave()

    def _join(self) -> None:
        """Hold the pair of this kind, with the values that are here: a load may have put new parameters in place."""
        own = cast("tuple[nn.Parameter, nn.Parameter]", (self.A, self.B))
        pair = self.pairs.setdefault(self.kind, own)
        for shared, mine in zip(pair, own, strict=True):
            shared.data = mine.data
        self.A, self.B = pair

    def _leave(self) -> None:
        """Hold parameters of its own, as a state from before the selection was loaded."""
        self.pairs.pop(self.kind, None)
        for name in ("A", "B"):
            shared = self._parameters[name]
            assert shared is not None
            self.register_parameter(name, nn.Parameter(shared.detach().clone(), shared.requires_grad))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """A state holds the pair once for each site: safetensors, and so `save_pretrained`, takes no tensor twice."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.stage == SHARED and not keep_vars:
            for key in (prefix + "A", prefix + "B"):
                destination[key] = destination[key].clone()

    @property
    def variant(self) -> Hashable:
        return self.stage == MEASURING

    def forward(self, y: Tensor, x: Tensor, host: nn.Module | None = None) -> Tensor:
        A = self._counted(lambda: self._energy(_code(x, self.A), self.B))
        return torch.ops.lrcompile.lora.default(y, x, *self.padded(A, self.B), self.scale, self.probability)

    def rows(self, y: Tensor, x: Tensor, start: int, stop: int) -> Tensor:
        B = self.B[start:stop]
        A = self._counted(lambda: self._energy(_code(x, self.A), B))
        return torch.ops.lrcompile.lora.default(y, x, *self.padded(A, B), self.scale, self.probability)

    def experts(self, y: Tensor, x: Tensor, index: Tensor | int) -> Tensor:
        if isinstance(index, int):
            A = self._counted(lambda: self._energy(_code(x, self.A[index]), self.B[index]))
            return torch.ops.lrcompile.lora.default(y, x, A[index], self.B[index], self.scale, self.probability)
        op = torch.ops.lrcompile.lora_experts.default
        A = self._counted(lambda: _square(op(torch.zeros_like(y), x, self.A, self.B, self.scale, index)))
        return op(y, x, *self.padded(A, self.B), self.scale, index, self.probability)

    def lookup(self, y: Tensor, ids: Tensor, padding_idx: int | None) -> Tensor:
        A = self._counted(lambda: self._energy(F.embedding(ids, self.A.mT), self.B))
        pad = -1 if padding_idx is None else padding_idx
        return torch.ops.lrcompile.lora_embedding.default(y, ids, *self.padded(A, self.B), self.scale, pad)

    def _counted(self, measure: Callable[[], Tensor]) -> Tensor:
        """A, whose gradient passes by the energy while it is measured."""
        if not (self.stage == MEASURING and self.training and torch.is_grad_enabled()):
            return self.A
        with torch.no_grad(), torch.autocast(self.A.device.type, enabled=False):
            amount = measure()
        return _Counted.apply(self.A, amount, self.energy)

    def _energy(self, code: Tensor, B: Tensor) -> Tensor:
        """s²·tr(S(BᵀB)Sᵀ) of S `[..., rank]`, B `[out, rank]`."""
        wide = torch.promote_types(B.dtype, torch.float32)
        code, B = code.to(wide), B.to(wide)
        return ((code @ (B.mT @ B)) * code).sum(dtype=torch.float64) * self.scale.double() ** 2

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MeasuredLora:
        energy = self.energy  # a sum of many small numbers: no cast of the model's touches it
        super()._apply(fn, recurse)
        self.energy = torch.zeros_like(energy, device=self.A.device) if energy.is_meta else energy.to(self.A.device)
        return self


class _Counted(torch.autograd.Function):
    """The identity on A; its backward adds `amount` to `energy`.

    So what counts are forwards that a backward pass goes through, each once: not those under no_grad, and not the
    second forward of gradient checkpointing, which either only restores what the first one saved, or takes its place.
    """

    @staticmethod
    def forward(ctx: Any, A: Tensor, amount: Tensor, energy: Tensor) -> Tensor:
        ctx.amount, ctx.energy = amount, energy
        return A.view_as(A)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        amount = ctx.amount
        # a batch that overflowed trains nothing: a gradient scaler leaves its step out
        ctx.energy.add_(torch.where(amount.isfinite(), amount, torch.zeros_like(amount)))
        return gradients[0], None, None


def projection(site: str) -> str:
    """What the weight of `site` is called in its layer: the last part of its name that is no index."""
    return next((part for part in reversed(site.split(".")) if not part.isdigit()), "")


def _code(x: Tensor, A: Tensor) -> Tensor:
    return F.linear(x, A.to(x.dtype))


def _square(y: Tensor) -> Tensor:
    return y.to(torch.promote_types(y.dtype, torch.float32)).square().sum(dtype=torch.float64)
