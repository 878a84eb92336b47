"""`quantize`: hold weights of linear maps as NF4 codes; `dequantize` takes it back where the originals were kept."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from lrcompile.allocating import Storing, choose, integers_as
from lrcompile.budgets import INT4, INT8, NF4, Allocation, checked_budget, described
from lrcompile.errors import AdapterError, MergeError, SpecError, TargetError
from lrcompile.integers.modules import attach_integers
from lrcompile.interop.bitsandbytes import taken_over
from lrcompile.kernels.nf4_dequant import BLOCK_SIZES, Nf4, quantize_nf4
from lrcompile.nf4.modules import Layout, attach, codes_of, detach, is_nf4, layout_of, nf4_weight
from lrcompile.nf4.targets import chosen
from lrcompile.progress import shown
from lrcompile.sites import ADAPTERS
from lrcompile.state import has_state, state_of
from lrcompile.targeting import ALL_LINEAR
from lrcompile.wording import listed
from lrcompile.wrapping import refuse_meta, refuse_wrapped

__all__ = ["Quantization", "base_of", "dequantize", "is_nf4", "nf4_weight", "quantization_of", "quantize"]

_log = logging.getLogger(__name__)
_BASE = "_lrcompile_nf4_base"
_RECORD = "_lrcompile_quantization"
_COMPUTE = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}


@dataclass(frozen=True)
class Quantization:
    """What the last `quantize` did: `quantized` names, and by name why a linear map was `spared`."""

    block_size: int
    double_quant: bool
    quantized: tuple[str, ...]
    """The maps stored as NF4."""
    spared: dict[str, str]
    reversible: bool
    allocation: Allocation | None = None
    """With a budget: what each map got, integers and float included, and why; prints as a table."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"allocation": None if self.allocation is None else self.allocation.to_dict()}


def quantize(
    model: nn.Module,
    scheme: str = "nf4",
    *,
    block_size: int = 64,
    double_quant: bool = True,
    compute_dtype: str | torch.dtype | None = None,
    targets: str | Sequence[str] = ALL_LINEAR,
    exclude: str | Sequence[str] | None = None,
    keep_base: str | None = None,
    budget: Mapping[str, float] | None = None,
    data: Iterable[Any] | None = None,
    integer_inputs: bool = False,
) -> nn.Module:
    """W ≈ c[q]·m in each targeted linear map: 4 bits an element and one maximum a block, codes as bitsandbytes' NF4.

    Changes `model` in place and returns it: each `nn.Linear` and `transformers` `Conv1D` keeps its class (a subclass of
    it), bias, hooks and name; `weight` gives way to the buffers `weight_codes`, `weight_absmax` and, with
    `double_quant`, `weight_absmax_scale` and `weight_absmax_offset`. The product is formed in `compute_dtype` (None:
    the weight's own). Works before `apply` (QLoRA) and after `merge(final=True)` (deployment). `"all-linear"` spares
    output heads, routers and what cannot be stored so, and `quantization_of(model).spared` says why; anything named
    outright is quantized or refused. One-way, unless `keep_base="cpu"` keeps the original bits in host memory for
    `dequantize`.

    Weights that bitsandbytes holds in NF4 already (`from_pretrained` with `load_in_4bit`) are taken over with the
    codes, blocks and compute dtype they have. `"all-linear"` then is these, and spares what bitsandbytes was told to
    skip.

    With `budget`, one of `{"bytes": N}`, `{"share": 0.3}` (of what the targeted weights take now) and `{"error": 0.02}`
    (‖y' − y‖/‖y‖ of the model's outputs), each map is stored as float, int8, int4 (in blocks of a row, as ONNX Runtime
    multiplies them) or NF4, by what that costs the outputs on `data`, an iterable of batches as for `apply`; the model
    is run on them once for each map, and an error budget is kept by what is measured of all maps together.
    `quantization_of(model).allocation` is the table of what each got and why. That error is of this model, of its
    `.pt2` and its `.onnx`; `export(nf4_form="int8")`, which multiplies faster, rounds the inputs of these maps to 8
    bits as well, and stores NF4 as int8. The table says what that comes to too; with `integer_inputs=True` the budget
    and the choice, which then leaves NF4 out, are about it. Such a model is for deployment: integers take no adapter
    and cannot be undone.

    Raises `SpecError` for an option, `TargetError` for a target, `AdapterError` for a model that is wrapped, adapted or
    merged; the model is then as it was.
    """
    compute = _checked_options(scheme, block_size, double_quant, compute_dtype, keep_base)
    refuse_wrapped(model, "quantize")
    _refuse_merged(model)
    limit = None if budget is None else checked_budget(budget)
    if limit is None and data is not None:
        raise SpecError("data is what a budget is measured on; give budget=, or leave data out", field="data")
    if limit is not None and (data is None or keep_base is not None):
        raise SpecError(
            "a budget is measured on your data: quantize(model, budget=…, data=batches), a batch being a dict"
            " (model(**batch)) or a tuple (model(*batch)); keep_base= does not go with it",
            field="data" if data is None else "keep_base",
        )
    if not isinstance(integer_inputs, bool) or (integer_inputs and limit is None):
        raise SpecError(
            f"integer_inputs is {integer_inputs!r}; True or False, and True says what a budget= counts",
            field="integer_inputs",
        )
    if limit is not None and data is not None:
        modules, spared = chosen(model, targets, exclude or ())
        return _within_budget(
            model, modules, spared, limit, data, Storing(block_size, double_quant, integer_inputs), compute
        )
    with taken_over(model) as names:
        modules, spared = ({}, {}) if names and targets == ALL_LINEAR else chosen(model, targets, exclude or ())
        stored = [
            (module, *_stored(name, module, block_size, double_quant, compute))
            for name, module in shown(modules.items(), "quantizing to NF4", len(modules))
        ]
        bases = [_kept(module, keep_base) for module in modules.values()] if keep_base else []
    for module, nf4, layout in stored:
        attach(module, nf4, layout)
    for module, base in zip(modules.values(), bases, strict=False):
        module.__dict__[_BASE] = base
    done = (*names, *modules)
    model.__dict__[_RECORD] = Quantization(block_size, double_quant, done, spared, keep_base is not None and not names)
    for name, reason in spared.items():
        _log.info("%s stays as it is: %s", name, reason)
    return model


def _within_budget(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    spared: dict[str, str],
    budget: Mapping[str, float],
    data: Iterable[Any],
    storing: Storing,
    compute: torch.dtype | None,
) -> nn.Module:
    refuse_meta(model, "quantize within a budget", AdapterError)
    for name, module in modules.items():
        if not torch.isfinite(module._parameters["weight"]).all():  # type: ignore[arg-type]
            raise TargetError(f"{name or 'the model'}: its weight holds values that are not finite; repair it")
    found = choose(model, modules, data, budget, storing)
    allocation, forms = described(budget, found, storing.integer_inputs), found.forms
    block_size, double_quant = storing.block_size, storing.double_quant
    as_codes = {
        name: _stored(name, modules[name], block_size, double_quant, compute)
        for name, form in forms.items() if form == NF4
    }  # fmt: skip
    as_integers = {name: integers_as(modules[name], form) for name, form in forms.items() if form in (INT8, INT4)}
    for name, held in as_codes.items():
        attach(modules[name], *held)
    for name, integers in as_integers.items():
        attach_integers(modules[name], *integers)
    as_nf4 = tuple(name for name, form in forms.items() if form == NF4)
    model.__dict__[_RECORD] = Quantization(block_size, double_quant, as_nf4, spared, False, allocation)
    return model


def dequantize(model: nn.Module) -> nn.Module:
    """Undo `quantize(..., keep_base="cpu")`, bit for bit: weights, classes and `requires_grad` as before.

    A weight comes back on the device its codes are on, and in another dtype only where the module was cast since.
    `AdapterError` if nothing is quantized, an original was not kept, or an adapter sits on top; the model is then as it
    was.
    """
    refuse_wrapped(model, "dequantize")
    found = {name: module for name, module in model.named_modules() if is_nf4(module)}
    if not found:
        raise AdapterError(f"this {type(model).__name__} has no weight stored as NF4")
    if lost := [name for name, module in found.items() if _BASE not in module.__dict__]:
        raise AdapterError(
            f"the original weights of {listed(lost)} were not kept; quantize(..., keep_base='cpu') keeps them"
        )
    if adapted := [name for name, module in found.items() if ADAPTERS in module._modules]:
        raise AdapterError(f"{listed(adapted)} carry an adapter; call lrcompile.remove first")
    bases = {name: _returned(module) for name, module in found.items()}
    for name, module in found.items():
        detach(module, bases[name])
        del module.__dict__[_BASE]
    for module in model.modules():
        module.__dict__.pop(_RECORD, None)
    return model


def quantization_of(model: nn.Module) -> Quantization | None:
    """What the last `quantize` of `model` did, None if there was none."""
    return model.__dict__.get(_RECORD)


def base_of(module: nn.Module) -> nn.Parameter | None:
    """The original weight that `keep_base` kept, as stored, None if it was not."""
    return module.__dict__.get(_BASE)


def _stored(
    name: str, module: nn.Module, block_size: int, double_quant: bool, compute: torch.dtype | None
) -> tuple[Nf4, Layout]:
    weight: torch.Tensor = module._parameters["weight"]  # type: ignore[assignment]
    try:
        nf4 = quantize_nf4(weight, block_size, double_quant)
    except ValueError as error:
        raise TargetError(f"{name or 'the model'}: {error}; repair it, or leave it out with exclude=") from error
    transposed = not isinstance(module, nn.Linear)
    out_features, in_features = weight.shape[::-1] if transposed else weight.shape
    return nf4, Layout(out_features, in_features, transposed, block_size, weight.dtype, compute)


def _kept(module: nn.Module, device: str) -> nn.Parameter:
    """A weight that lives on the host already is kept itself, so that its identity comes back too."""
    weight: nn.Parameter = module._parameters["weight"]  # type: ignore[assignment]
    return weight if weight.device.type == device else nn.Parameter(weight.detach().to(device), weight.requires_grad)


def _returned(module: nn.Module) -> nn.Parameter:
    base: nn.Parameter = module.__dict__[_BASE]
    device, dtype = codes_of(module).codes.device, layout_of(module).dtype
    if (base.device, base.dtype) == (device, dtype):
        return base
    return nn.Parameter(base.detach().to(device=device, dtype=dtype), base.requires_grad)


def _checked_options(
    scheme: str, block_size: int, double_quant: bool, compute_dtype: str | torch.dtype | None, keep_base: str | None
) -> torch.dtype | None:
    if scheme != "nf4":
        raise SpecError(f"scheme is {scheme!r}; expected 'nf4'", field="scheme")
    if isinstance(block_size, bool) or block_size not in BLOCK_SIZES:
        sizes = ", ".join(map(str, BLOCK_SIZES))
        raise SpecError(f"block_size is {block_size!r}; expected one of {sizes}", field="block_size")
    if not isinstance(double_quant, bool):
        raise SpecError(f"double_quant is {double_quant!r}; expected True or False", field="double_quant")
    if keep_base not in (None, "cpu"):
        raise SpecError(f"keep_base is {keep_base!r}; expected None or 'cpu'", field="keep_base")
    if compute_dtype is None:
        return None
    name = str(compute_dtype).removeprefix("torch.")
    if name not in _COMPUTE:
        expected = ", ".join(_COMPUTE)
        raise SpecError(
            f"compute_dtype is {compute_dtype!r}; expected None or one of {expected}", field="compute_dtype"
        )
    return _COMPUTE[name]


def _refuse_merged(model: nn.Module) -> None:
    for module in model.modules():
        if has_state(module) and state_of(module).merged:
            raise MergeError(
                "an adapter is merged, its originals kept; call merge(model, final=True) or unmerge, then quantize"
            )
