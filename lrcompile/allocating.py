"""What storing each map as int8, int4 or NF4 costs a model's outputs, on calibration data.

r(s, NF4) = ‖y' − y‖²/‖y‖² is measured: the data run with map s alone as NF4. Other forms are taken in proportion to
what they do to the map's own outputs, ‖X·(Ŵ − W)ᵀ‖².
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lrcompile.batches import fitted, run, taken
from lrcompile.budgets import FLOAT, INT4, INT8, NF4, Options, within_bytes, within_error
from lrcompile.errors import SpecError
from lrcompile.integers.blocks import Integers, dequantize_integers, quantize_integers
from lrcompile.integers.modules import IntegerLayout
from lrcompile.kernels.nf4_dequant import dequantize_nf4, nf4_shapes, quantize_nf4
from lrcompile.progress import shown
from lrcompile.undisturbed import set_mode, undisturbed
from lrcompile.verifying.outputs import named_outputs
from lrcompile.watching import second_moments

INT8_BLOCK, INT4_BLOCK = 64, 32


def choose(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    data: Iterable[Any],
    budget: Mapping[str, float],
    block_size: int,
    double_quant: bool,
) -> tuple[dict[str, str], Watched, dict[str, Options]]:
    """The form of each map by name. Raises `SpecError` for a size that not even the smallest forms fit."""
    watched = Watched(model, data)
    moments = second_moments(model, {name: name for name in modules}, watched.batches, label="what comes into each map")
    options = {}
    for name, module in shown(modules.items(), "what each map costs as NF4", len(modules)):
        options[name] = _options(watched, module, moments.pop(name), block_size, double_quant)
    ((kind, limit),) = budget.items()
    if kind == "error":
        return within_error(options, limit), watched, options
    most = limit if kind == "bytes" else limit * sum(each.bytes[FLOAT] for each in options.values())
    return within_bytes(options, most), watched, options


class Watched:
    """A model's outputs on calibration batches, and how far a changed model's are from them."""

    def __init__(self, model: nn.Module, data: Iterable[Any]):
        self.model = model
        self.batches = [fitted(model, each, index) for index, each in enumerate(taken(data, None, "calibration data"))]
        self.outputs = self._run()
        self.size = self._norm2({name: [value.double() for value in each] for name, each in self.outputs.items()})
        if not 0 < self.size < float("inf"):
            raise SpecError("the model's outputs on this data are all zero or not finite", field="data")

    def moved(self) -> float:
        """‖y' − y‖²/‖y‖² now."""
        now = self._run()
        gaps = {
            name: [new.double() - old.double() for new, old in zip(now[name], each, strict=True)]
            for name, each in self.outputs.items()
        }
        return self._norm2(gaps) / self.size

    def moved_by(self, forms: Mapping[nn.Module, str], block_size: int, double_quant: bool) -> float:
        """The same with the weights of these modules as they are read back from the given forms, for the moment."""
        before: dict[nn.Parameter, Tensor] = {}
        try:
            for module, form in forms.items():
                if form != FLOAT:
                    parameter: Any = module._parameters["weight"]
                    values = _decoded(module, form, block_size, double_quant)
                    before[parameter] = parameter.data
                    parameter.data = values.to(parameter.data)
            return self.moved()
        finally:
            for parameter, data in before.items():
                parameter.data = data

    def _norm2(self, values: Mapping[str, list[Tensor]]) -> float:
        return sum(float(each.square().sum()) for entries in values.values() for each in entries)

    def _run(self) -> dict[str, list[Tensor]]:
        found: dict[str, list[Tensor]] = {}
        with undisturbed(self.model, 0), torch.no_grad():
            set_mode(self.model, False)
            for index, batch in enumerate(self.batches):
                for name, value in named_outputs(run(self.model, batch, index)).items():
                    if value.is_floating_point():
                        found.setdefault(name, []).append(value.detach().cpu())
        return found


def _options(watched: Watched, module: nn.Module, H: Tensor, block_size: int, double_quant: bool) -> Options:
    stored: Tensor = module._parameters["weight"].detach()  # type: ignore[union-attr]
    turned = not isinstance(module, nn.Linear)
    weight = (stored.t() if turned else stored).float()
    H = H.to(weight.device, torch.float64)
    own = max(float(((weight.double() @ H) * weight).sum()), torch.finfo(torch.float32).tiny)
    error2 = {FLOAT: 0.0}
    for form in (NF4, INT4, INT8):
        values = _decoded(module, form, block_size, double_quant)
        gap = ((values.t() if turned else values) - weight).double()
        error2[form] = max(float(((gap @ H) * gap).sum()), 0.0) / own
    moved = watched.moved_by({module: NF4}, block_size, double_quant)
    r = {form: moved * (each / error2[NF4] if error2[NF4] > 0 else 0.0) for form, each in error2.items()}
    sizes = _bytes(stored, weight.shape, block_size, double_quant)
    return Options(sizes, {form: each**0.5 for form, each in error2.items()}, r)


def _decoded(module: nn.Module, form: str, block_size: int, double_quant: bool) -> Tensor:
    """The weight of `module` as it is read back from a form, float32 and in its own storage order."""
    stored: Tensor = module._parameters["weight"].detach()  # type: ignore[union-attr]
    if form == NF4:
        return dequantize_nf4(quantize_nf4(stored, block_size, double_quant), tuple(stored.shape), block_size)
    held, layout = integers_as(module, form)
    weight = dequantize_integers(held, layout.in_features, layout.bits)
    return weight.t() if layout.transposed else weight


def _bytes(stored: Tensor, shape: torch.Size, block_size: int, double_quant: bool) -> dict[str, int]:
    out, inside = shape
    codes, maxima, scales = nf4_shapes(stored.numel(), block_size)
    return {
        FLOAT: stored.numel() * stored.element_size(),
        INT8: out * -(-inside // INT8_BLOCK) * (INT8_BLOCK + 4),
        INT4: out * -(-inside // INT4_BLOCK) * (INT4_BLOCK // 2 + 4),
        NF4: codes + (maxima + 4 * scales + 4 if double_quant else 4 * maxima),
    }


def integers_as(module: nn.Module, form: str) -> tuple[Integers, IntegerLayout]:
    """The weight of `module` as int8 or int4."""
    weight: torch.Tensor = module._parameters["weight"]  # type: ignore[assignment]
    transposed = not isinstance(module, nn.Linear)
    bits, block = (8, INT8_BLOCK) if form == INT8 else (4, INT4_BLOCK)
    rows = weight.detach().t() if transposed else weight.detach()
    return quantize_integers(rows, bits, block), IntegerLayout(rows.shape[1], bits, block, transposed, weight.dtype)
