"""What storing each map as int8, int4 or NF4 costs a model's outputs, on calibration data.

r(s, NF4) = ‖y' − y‖²/‖y‖² is measured: the data run with map s alone as NF4. Other forms are taken in proportion to
what they do to the map's own outputs, E‖(Ŵ − W)·x‖². Where kernels round inputs to 8 bits too, x̂ = x + n, integers cost
E‖Ŵ·x̂ − W·x‖² ≈ E‖(Ŵ − W)·x‖² + Σⱼ ‖Ŵⱼ‖²·E nⱼ²: rounding is as good as independent, of x and among the elements of n.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lrcompile.budgets import FLOAT, INT4, INT8, NF4, Chosen, Options, within_bytes, within_error
from lrcompile.errors import SpecError
from lrcompile.integers.blocks import Integers, dequantize_integers, quantize_integers, rounded_inputs
from lrcompile.integers.modules import IntegerLayout
from lrcompile.kernels.nf4_dequant import dequantize_nf4, nf4_shapes, quantize_nf4
from lrcompile.observing import Observed
from lrcompile.progress import shown, status
from lrcompile.watching import SecondMoments, watch

BITS, BLOCKS = {INT8: 8, INT4: 4}, {INT8: 64, INT4: 32}
_LESS = 0.9


@dataclass(frozen=True)
class Storing:
    """How maps are stored and multiplied, whichever form each gets."""

    block_size: int
    double_quant: bool
    integer_inputs: bool
    """Count what export(nf4_form="int8") ships: inputs rounded to 8 bits, and nothing as NF4, which is int8 there."""


def choose(
    model: nn.Module, modules: Mapping[str, nn.Module], data: Iterable[Any], budget: Mapping[str, float],
    storing: Storing,
) -> Chosen:  # fmt: skip
    """Raises `SpecError` for a size that not even the smallest forms fit."""
    watched, inputs = Watched(model, data), _Inputs(storing.integer_inputs)
    watch(model, {name: name for name in modules}, watched.batches, inputs.take, label="what comes into each map")
    moments, options = inputs.moments.means(), {}
    for name, module in shown(modules.items(), "what each map costs as NF4", len(modules)):
        options[name] = _options(watched, module, moments.pop(name), inputs.noise_of(name), storing)
    ((kind, limit),) = budget.items()
    moved = partial(_moved, watched, modules, storing)
    with status("what the whole model costs"):
        if kind == "error":
            forms = _within_error(moved, options, limit, storing)
        else:
            most = limit if kind == "bytes" else limit * sum(each.bytes[FLOAT] for each in options.values())
            forms = within_bytes(options, most)
        return Chosen(forms, options, moved(forms, False), moved(forms, True))


def _within_error(moved: Any, options: dict[str, Options], limit: float, storing: Storing) -> dict[str, str]:
    """Errors add up only nearly as independent ones do: what is aimed at shrinks until the one measured is within."""
    aim, forms, counted = limit, dict[str, str](), 0.0
    while True:
        before, forms = forms, within_error(options, aim)
        counted = counted if forms == before else moved(forms, storing.integer_inputs)
        if counted <= limit:
            return forms
        aim *= min(limit / counted, _LESS)


def _moved(
    watched: Watched, modules: Mapping[str, nn.Module], storing: Storing, forms: Mapping[str, str], rounded: bool
) -> float:
    return watched.moved_by({modules[name]: form for name, form in forms.items()}, storing, rounded) ** 0.5


class _Inputs:
    """What comes into each map: its second moments, and the mean square of what rounding to 8 bits adds to it."""

    def __init__(self, rounded: bool):
        self.moments = SecondMoments()
        self._rounded = rounded
        self._noise: dict[tuple[str, str], Tensor] = {}
        self._counts: dict[str, int] = {}

    def take(self, name: str, x: Tensor) -> None:
        self.moments.take(name, x)
        for form in BLOCKS if self._rounded else ():
            noise = (rounded_inputs(x, BLOCKS[form]) - x).double().square().sum(0).cpu()
            self._noise[name, form] = self._noise.get((name, form), 0) + noise
        self._counts[name] = self._counts.get(name, 0) + len(x)

    def noise_of(self, name: str) -> dict[str, Tensor]:
        """E nⱼ² `[in]`, by the form inputs are rounded for."""
        return {form: total / self._counts[name] for (each, form), total in self._noise.items() if each == name}


class Watched(Observed):
    """How far a changed model's outputs are from those it had."""

    def __init__(self, model: nn.Module, data: Iterable[Any]):
        super().__init__(model, data)
        self.before = list(self.outputs())
        self.size = sum(float(y.double().square().sum()) for y in self.before)
        if not 0 < self.size < float("inf"):
            raise SpecError("the model's outputs on this data are all zero or not finite", field="data")

    def moved(self) -> float:
        """‖y' − y‖²/‖y‖² now."""
        gaps = (now.double() - y.double() for now, y in zip(self.outputs(), self.before, strict=True))
        return sum(float(gap.square().sum()) for gap in gaps) / self.size

    def moved_by(self, forms: Mapping[nn.Module, str], storing: Storing, rounded: bool = False) -> float:
        """The same with the weights of these modules as they are read back from the given forms, for the moment;
        `rounded`: as export(nf4_form="int8") ships them.
        """
        stored = {module: form for module, form in forms.items() if form != FLOAT}
        before: dict[nn.Parameter, Tensor] = {}
        try:
            for module, form in stored.items():
                parameter: Any = module._parameters["weight"]
                values = _decoded(parameter.detach(), _transposed(module), form, storing, rounded)
                before[parameter] = parameter.data
                parameter.data = values.to(parameter.data)
            with _rounding_inputs(stored if rounded else {}):
                return self.moved()
        finally:
            for parameter, data in before.items():
                parameter.data = data


@contextmanager
def _rounding_inputs(forms: Mapping[nn.Module, str]) -> Iterator[None]:
    """What comes into these modules is rounded as the kernels of their forms do."""

    def rounded(block: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        values = {name: rounded_inputs(x, block) for name, x in kwargs.items()}
        return tuple(rounded_inputs(x, block) for x in args), values

    hooks = {module: partial(rounded, BLOCKS[INT8 if form == NF4 else form]) for module, form in forms.items()}
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _options(watched: Watched, module: nn.Module, H: Tensor, noise: Mapping[str, Tensor], storing: Storing) -> Options:
    stored: Tensor = module._parameters["weight"].detach()  # type: ignore[union-attr]
    turned = _transposed(module)
    weight = (stored.t() if turned else stored).float()
    H = H.to(weight.device, torch.float64)
    own = max(float(((weight.double() @ H) * weight).sum()), torch.finfo(torch.float32).tiny)
    error2 = {FLOAT: 0.0}
    for form in (NF4, INT4, INT8):
        values = _decoded(stored, turned, form, storing)
        values = (values.t() if turned else values).double()
        gap = values - weight
        lost2 = max(float(((gap @ H) * gap).sum()), 0.0)
        if form in noise:
            lost2 += float((values.square().sum(0) * noise[form].to(values.device)).sum())
        error2[form] = lost2 / own
    moved = watched.moved_by({module: NF4}, storing)
    r = {form: moved * (each / error2[NF4] if error2[NF4] > 0 else 0.0) for form, each in error2.items()}
    sizes = _bytes(stored, weight.shape, storing)
    if storing.integer_inputs:
        del sizes[NF4]
    return Options(sizes, {form: each**0.5 for form, each in error2.items()}, r)


def _decoded(stored: Tensor, turned: bool, form: str, storing: Storing, rounded: bool = False) -> Tensor:
    """A weight as it is read back from a form, float32 and in its own storage order; `rounded`: NF4 as int8."""
    if form == NF4:
        nf4 = quantize_nf4(stored, storing.block_size, storing.double_quant)
        values = dequantize_nf4(nf4, tuple(stored.shape), storing.block_size)
        return _decoded(values, turned, INT8, storing) if rounded else values
    rows = stored.t() if turned else stored
    weight = dequantize_integers(quantize_integers(rows, BITS[form], BLOCKS[form]), rows.shape[1], BITS[form])
    return weight.t() if turned else weight


def _bytes(stored: Tensor, shape: torch.Size, storing: Storing) -> dict[str, int]:
    out, inside = shape
    codes, maxima, scales = nf4_shapes(stored.numel(), storing.block_size)
    return {
        FLOAT: stored.numel() * stored.element_size(),
        **{form: out * -(-inside // BLOCKS[form]) * (BLOCKS[form] * BITS[form] // 8 + 4) for form in BLOCKS},
        NF4: codes + (maxima + 4 * scales + 4 if storing.double_quant else 4 * maxima),
    }


def _transposed(module: nn.Module) -> bool:
    return not isinstance(module, nn.Linear)


def integers_as(module: nn.Module, form: str) -> tuple[Integers, IntegerLayout]:
    """The weight of `module` as int8 or int4."""
    weight: torch.Tensor = module._parameters["weight"]  # type: ignore[assignment]
    rows = weight.detach().t() if _transposed(module) else weight.detach()
    out, inside = rows.shape
    layout = IntegerLayout(out, inside, _transposed(module), BLOCKS[form], weight.dtype, BITS[form])
    return quantize_integers(rows, BITS[form], BLOCKS[form]), layout
