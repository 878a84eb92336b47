"""LoRA-FA's gradient correction (the second version of arXiv 2308.03303, as PEFT's optimizer has it)."""

from __future__ import annotations

from torch import Tensor, nn

from lrcompile.optim.grams import gram, inverse, wide
from lrcompile.optim.rule import Rule, Step
from lrcompile.recipes.forms.pair import LoraAdapter


class Correction(Rule):
    """ĝ_B = s⁻²·g_B·(AAᵀ + 1e-8·I)⁻¹, which the optimizer then takes for the gradient of B.

    s·ĝ_B·A is then the projection of the weight's gradient on the rows of A: the nearest to it that a step of B can
    make. A does not change, so its inverse Gram matrix is computed once, in float64. Where AAᵀ = I and s = 1 nothing
    changes. Clip gradients before the step, as ever: what is clipped are those of LoRA. Off with `correction=False`.
    """

    def __init__(self, model: nn.Module, name: str):
        super().__init__(model, name)
        self._known: dict[int, tuple[tuple[int, int], Tensor]] = {}

    def before_step(self, step: Step) -> None:
        if not self.spec.correction:
            return
        for adapter in self.pairs():
            grad = adapter.B.grad
            if grad is not None:
                exact = wide(grad)
                grad.copy_(grad.to(exact) @ self._inverse(adapter).to(exact) / adapter.scale.to(exact) ** 2)

    def _inverse(self, adapter: LoraAdapter) -> Tensor:
        """(AAᵀ + 1e-8·I)⁻¹, anew when A was written to, as a load does."""
        A = adapter.A
        key = (A.data_ptr(), A._version)
        known = self._known.get(id(adapter))
        if known is None or known[0] != key:
            known = self._known[id(adapter)] = (key, inverse(gram(A)))
        return known[1]
