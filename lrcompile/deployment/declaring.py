"""What a form that only approximates NF4 weights costs: measured on the example inputs, declared in the manifest."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lrcompile.passes.base import Pass, Program, Result
from lrcompile.state import has_state, state_of
from lrcompile.switching import switched_off
from lrcompile.verifying.outputs import named_outputs
from lrcompile.verifying.runners import evaluating
from lrcompile.verifying.verdict import Limits

ROOM = 4.0
"""What is declared, as a multiple of what was measured: other inputs are hit harder where the model amplifies, by a few
times; wrong codes or a wrong kernel move outputs by as much as they are."""
_MOST_OF_AN_EFFECT = 0.5
_PLACES = 2  # figures of a declared number

Examples = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Declared:
    """Callback of a pipeline: runs the examples before the first pass called one of `names`, and after each."""

    names: tuple[str, ...]
    reference: Callable[[], nn.Module]
    """The model that the file is held against; its outputs without adapters say what these do."""
    examples: Examples
    relative_error: float = 0.0
    """‖y' − y‖/‖y‖, of the output where it is largest."""
    effect_error: float | None = None
    """‖y' − y‖/‖effect of the adapters‖ over all outputs; None without an adapter that does anything."""
    before: Mapping[str, Tensor] | None = field(default=None, repr=False)

    def __call__(self, each: Pass, program: Program) -> Callable[[Result], None]:
        if each.name not in self.names:
            return lambda _: None
        if self.before is None:
            self.before = self._run(program.module())

        def after(result: Result) -> None:
            if result.modified and self.before is not None:
                self._compare(self.before, self._run(program.module()))

        return after

    def _compare(self, before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> None:
        gaps = {name: (now[name].double() - value.double()).norm() for name, value in before.items()}
        shares = [float(gaps[name] / value.double().norm()) for name, value in before.items() if value.any()]
        self.relative_error = max(shares, default=0.0)
        effect2 = 0.0
        for name, value in self._base().items():
            if name in before and value.shape == before[name].shape:
                effect2 += float((before[name].double() - value.double()).square().sum())
        if effect2 > 0:
            self.effect_error = float(sum(gap.square() for gap in gaps.values())) ** 0.5 / effect2**0.5

    def _base(self) -> Mapping[str, Tensor]:
        model = self.reference()
        if not has_state(model) or not state_of(model).active:
            return {}
        with switched_off(model):
            return self._run(model)

    def _run(self, module: nn.Module) -> dict[str, Tensor]:
        args, kwargs = self.examples
        with torch.no_grad(), evaluating(module):
            outputs = named_outputs(module(*args, **kwargs))
        return {name: value for name, value in outputs.items() if value.is_floating_point()}

    def limits(self, strict: Limits) -> Limits:
        """`strict`, with room for what was measured; a lost adapter is never let through."""
        effect = strict.adapter_relative_error
        if self.effect_error is not None:
            effect = max(effect, min(_rounded_up(ROOM * self.effect_error), _MOST_OF_AN_EFFECT))
        return Limits(strict.bound_ratio, effect, _rounded_up(ROOM * self.relative_error))

    @property
    def reason(self) -> str:
        said = (
            f"; the weights' form is an approximation: on the example inputs outputs moved by {self.relative_error:.2g}"
        )
        if self.effect_error is not None:
            said += f", {self.effect_error:.2g} of what the adapters do"
        return said + f"; declared is {ROOM:g} times that"


def _rounded_up(value: float) -> float:
    if value == 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(value)) - _PLACES + 1)
    return round(math.ceil(value / unit) * unit, 12)
