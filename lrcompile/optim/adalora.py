"""AdaLoRA's allocation: after each optimizer step the triplets' importance, and who keeps a place in the budget."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lrcompile.optim.rule import Rule, Step
from lrcompile.recipes.forms.adalora import TripletAdapter
from lrcompile.sharding import like, whole
from lrcompile.specs import Spec

State = MutableMapping[Tensor, dict[str, Any]]
IMPORTANCE, UNCERTAINTY, KEPT = "lrcompile_importance", "lrcompile_uncertainty", "lrcompile_kept"
"""Keys of an optimizer's state: Ī and Ū of every element until the budget is final; from then on, which E stay."""


def budget(spec: Spec, step: int, start: int, target: int) -> int:
    """b = ⌊target + (start − target)·(1 − (step − tinit)/(total_steps − tinit − tfinal))³⌋ between the first `tinit`
    and the last `tfinal` steps; `start` before, `target` after.
    """
    if step <= spec.tinit:
        return start
    if step > spec.total_steps - spec.tfinal:
        return target
    left = 1 - (step - spec.tinit) / (spec.total_steps - spec.tinit - spec.tfinal)
    return int((start - target) * left**3 + target)


def least(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """Masks, shaped as `scores` `[..., rank]`, of exactly the `count` smallest of all of them.

    Among equal ones those late in their adapter go first, then those of earlier adapters: before anything is learned
    all scores are 0, and the ranks then shrink evenly instead of site by site (or, by comparing with a threshold, all
    at once).
    """
    device = scores[0].device
    flat = torch.cat([each.flatten().to(device) for each in scores])
    place = torch.cat([torch.arange(s.shape[-1], device=device).expand(s.shape).flatten() for s in scores])
    order = place.argsort(descending=True, stable=True)
    order = order[flat[order].argsort(stable=True)]
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[order[:count]] = True
    parts = chosen.split([each.numel() for each in scores])
    return [part.view(each.shape).to(each.device) for part, each in zip(parts, scores, strict=True)]


class Allocation(Rule):
    """Sets E to 0 for the triplets outside the budget (arXiv 2303.10512, as its authors' code does it).

    Per element, importance I = |w·∂w| (new weights, this step's gradients), Ī ← β₁Ī + (1 − β₁)I, Ū ← β₂Ū + (1 − β₂)|I
    − Ī|, score Ī·Ū. A triplet's score is E's plus the means over its row of A and its column of B. Of all triplets of
    the adapter the best `budget` stay, every `delta_t` steps after `tinit`; values are zeroed, so a triplet may come
    back until step total_steps − tfinal. From then on the choice is final.

    Every map of a stack (an expert, say) has triplets of its own. A tensor without gradient counts as unimportant; an
    E that none ever reached keeps nothing.
    """

    def after_step(self, step: Step) -> None:
        spec, state, last = self.spec, step.optimizer.state, self.spec.total_steps - self.spec.tfinal
        adapters = list(self._triplets())
        if step.number > last and any(KEPT in state.get(adapter.E, ()) for adapter in adapters):
            for adapter in adapters:
                kept = state.get(adapter.E, {}).get(KEPT)
                adapter.E.masked_fill_(torch.ones_like(adapter.E, dtype=torch.bool) if kept is None else kept == 0, 0.0)
            return
        if step.number < last:
            for adapter in adapters:
                for tensor in (adapter.A, adapter.E, adapter.B):
                    self._weigh(state, tensor)
        if step.number >= last or (step.number > spec.tinit and step.number % spec.delta_t == 0):
            masks = self._dropped(state, adapters, step.number)
            for adapter, mask in zip(adapters, masks, strict=True):
                mask = like(adapter.E, mask)
                adapter.E.masked_fill_(mask, 0.0)
                if step.number >= last:
                    _settle(state, adapter, mask)

    def _triplets(self) -> Iterator[TripletAdapter]:
        for _, adapter in self.adapters():
            assert isinstance(adapter, TripletAdapter)
            yield adapter

    def _weigh(self, state: State, w: Tensor) -> None:
        """Bring Ī and Ū of `w` up to date. They begin as zeros, which a tensor without gradient has in any case."""
        if w.grad is None and IMPORTANCE not in state.get(w, ()):
            return  # a state that is begun here keeps the optimizer from beginning its own
        spec, mine = self.spec, state[w]
        now = torch.zeros_like(w) if w.grad is None else (w * w.grad).abs()
        mean = mine.setdefault(IMPORTANCE, torch.zeros_like(w))
        mean.mul_(spec.beta1).add_(now, alpha=1 - spec.beta1)
        spread = mine.setdefault(UNCERTAINTY, torch.zeros_like(w))
        spread.mul_(spec.beta2).add_((now - mean).abs(), alpha=1 - spec.beta2)

    def _dropped(self, state: State, adapters: Sequence[TripletAdapter], step: int) -> list[Tensor]:
        """For each E, a mask of what lies outside the budget of this step."""
        start = sum(adapter.E.numel() for adapter in adapters)
        target = self.spec.target_rank * sum(adapter.E.numel() // adapter.rank for adapter in adapters)
        count = start - budget(self.spec, step, start, target)
        return [mask.unsqueeze(-1) for mask in least([whole(_scores(state, adapter)) for adapter in adapters], count)]


def _scores(state: State, adapter: TripletAdapter) -> Tensor:
    """S `[..., rank]`; where no gradient ever reached E, below that of every other triplet."""
    if IMPORTANCE not in state.get(adapter.E, ()):
        return torch.full_like(adapter.E.squeeze(-1), -1.0)
    A, E, B = (state[w][IMPORTANCE] * state[w][UNCERTAINTY] for w in (adapter.A, adapter.E, adapter.B))
    return E.squeeze(-1) + A.mean(-1) + B.mean(-2)


def _settle(state: State, adapter: TripletAdapter, mask: Tensor) -> None:
    """Write down the final choice, and free what only a budget that moves needs."""
    if adapter.E in state:
        state[adapter.E][KEPT] = (~mask).to(adapter.E.dtype)  # an optimizer's load casts to that
    for tensor in (adapter.A, adapter.E, adapter.B):
        for key in (IMPORTANCE, UNCERTAINTY):
            state.get(tensor, {}).pop(key, None)
