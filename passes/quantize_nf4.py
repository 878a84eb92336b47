"""quantize-nf4: W ≈ c[q]·m, four bits an element and one maximum a block (arXiv 2305.14314)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lrcompile.errors import ExportError, SpecError
from lrcompile.kernels.nf4_dequant import ABSMAX_BLOCK, Nf4, decode_absmax, dequantize_nf4, quantize_nf4
from lrcompile.passes.base import Equivalence, Pass, Program, Result
from lrcompile.passes.nodes import NF4_LINEAR, tidy
from lrcompile.passes.tensors import Tensors, substitute
from lrcompile.recipes.recipe import BLOCK_SIZES
from lrcompile.sites.linear import conv1d
from lrcompile.targeting import is_router, output_heads

aten = torch.ops.aten
_PRODUCTS = (aten.linear.default, aten.addmm.default)


@dataclass(frozen=True)
class QuantizeNf4(Pass[Program]):
    """W ≈ c[q]·m for the linear maps `lrcompile.quantize` would take: not heads, routers, shared weights.

    Each weight is computed, quantized and dropped before the next one. Errors are max |Ŵ − W| / (m + S): m the largest
    element of the block, which the code's widest gap (2·0.152) is in units of; S the largest deviation of a block's
    maximum from their mean among 256, which the rounding of the maxima (0.008) is in units of.
    """

    name: ClassVar[str] = "quantize-nf4"
    preserves: ClassVar[Equivalence] = "approximate"
    tolerance: ClassVar[float] = 0.152
    block_size: int = 64

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            message = f"block_size={self.block_size} is not valid: choose one of {BLOCK_SIZES}"
            raise SpecError(message, field="block_size")

    def apply(self, program: Program) -> Result:
        tensors, errors = Tensors(program.exported), {}
        spared = output_heads(program.model)
        for weight in list(program.exported.graph.nodes):
            target, products = tensors.target(weight), list(weight.users)
            if target is None or not products or not all(_is_product(node, weight) for node in products):
                continue
            site, _, slot = target.rpartition(".")
            if slot == "weight" and site not in spared and _may_store(program.model, site):
                pending = program.pending.pop(target, None)
                value = pending() if pending else tensors.get(weight)
                errors[target] = self._store(program, tensors, weight, value, products)
        if errors:
            tidy(program.exported)
        return Result(len(errors), errors=errors)

    def _store(
        self, program: Program, tensors: Tensors, weight: fx.Node, value: Tensor, products: list[fx.Node]
    ) -> float:
        target = tensors.targets[weight.name]
        try:
            nf4 = quantize_nf4(value, self.block_size)  # double quantization too, as `lrcompile.quantize` does
        except ValueError as error:
            raise ExportError(f"{target} cannot be stored as NF4: {error}") from error
        absmax = decode_absmax(nf4)
        codes_node = tensors.add(f"{target}_codes", nf4.codes, weight)
        absmax_node = tensors.add(f"{target}_absmax", absmax, weight)
        for node in products:
            x, _, bias = _operands(node)
            transposed = node.target is aten.addmm.default
            rows, columns = value.shape
            sizes = (columns, rows) if transposed else (rows, columns)
            with program.exported.graph.inserting_before(node):
                stored = program.exported.graph.call_function(
                    NF4_LINEAR,
                    (x, codes_node, absmax_node, None, None, bias, *sizes, self.block_size, transposed, value.dtype),
                )
            stored.meta = dict(node.meta)
            substitute(program.exported, node, stored)
        return _error(value, nf4, self.block_size)


def _error(value: Tensor, nf4: Nf4, block_size: int) -> float:
    """max |Ŵ − W| / (m + S); |Ŵ − W| ≤ 0.1519·m + |m̂ − m| and |m̂ − m| ≤ 0.0071·S."""
    stored = dequantize_nf4(nf4, tuple(value.shape), block_size)
    peak, gap = (_peaks(each, block_size) for each in (value.float(), stored - value.float()))
    assert nf4.absmax_scale is not None  # double quantization
    spread = nf4.absmax_scale.repeat_interleave(ABSMAX_BLOCK)[: peak.numel()]
    return float((gap / (peak + spread).clamp_min(torch.finfo(peak.dtype).tiny)).max())


def _peaks(tensor: Tensor, block_size: int) -> Tensor:
    flat = tensor.flatten().abs()
    return F.pad(flat, (0, -flat.numel() % block_size)).view(-1, block_size).amax(1)


def _is_product(node: fx.Node, weight: fx.Node) -> bool:
    if node.target not in _PRODUCTS or node.kwargs:
        return False
    _, read, bias = _operands(node)
    return read is weight and (bias is None or bias.meta["val"].dim() == 1)


def _operands(node: fx.Node) -> tuple[Any, Any, Any]:
    if node.target is aten.addmm.default:
        bias, x, weight = node.args
        return x, weight, bias
    return node.args[0], node.args[1], node.args[2] if len(node.args) > 2 else None


def _may_store(model: nn.Module, name: str) -> bool:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return False
    linear = isinstance(module, nn.Linear) or (conv1d() is not None and isinstance(module, conv1d()))
    inside = isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention)
    return linear and not inside and not is_router(model, name)
