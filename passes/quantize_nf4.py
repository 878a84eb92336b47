"""quantize-nf4: W ≈ c[q]·m, four bits an element and one maximum a block (arXiv 2305.14314)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from lrcompile.errors import ExportError, SpecError
from lrcompile.kernels.nf4_linear import decode_absmax, dequantize_nf4, quantize_nf4
from lrcompile.passes.base import Equivalence, Pass, Program, Result
from lrcompile.passes.nodes import NF4_LINEAR, tidy
from lrcompile.passes.tensors import Tensors, substitute
from lrcompile.recipes.qlora import BLOCK_SIZES
from lrcompile.sites.linear import conv1d
from lrcompile.targeting import is_router, output_heads

aten = torch.ops.aten
_PRODUCTS = (aten.linear.default, aten.addmm.default)


@dataclass(frozen=True)
class QuantizeNf4(Pass):
    """W ≈ c[q]·m for the linear maps `lrcompile.quantize` would take: not heads, routers, shared weights.

    Each weight is computed, quantized and dropped before the next one. Errors are max |Ŵ − W| in units of the block's
    largest element: half the widest gap of the code, 0.152, and what the second quantization of the maxima adds.
    """

    name: ClassVar[str] = "quantize-nf4"
    preserves: ClassVar[Equivalence] = "approximate"
    tolerance: ClassVar[float] = 0.17
    block_size: int = 64

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            message = f"block_size={self.block_size} is not valid: choose one of {BLOCK_SIZES}"
            raise SpecError(message, field="block_size")

    def apply(self, program: Program) -> Result:
        tensors, errors = Tensors(program.exported), {}
        spared = output_heads(program.model)
        for weight in list(program.exported.graph.nodes):
            name = str(tensors.target(weight)).removesuffix(".weight")
            products = list(weight.users)
            if name in spared or not all(_is_product(node, weight) for node in products):
                continue
            if _may_store(program.model, name):
                pending = program.pending.pop(tensors.targets[weight.name], None)
                value = pending() if pending else tensors.get(weight)
                errors[name] = self._store(program, tensors, weight, value, products)
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
        return _error(value, dequantize_nf4(nf4, tuple(value.shape), self.block_size), absmax, self.block_size)


def _error(value: Tensor, stored: Tensor, absmax: Tensor, block_size: int) -> float:
    """The largest deviation of an element, in units of its block's maximum as stored."""
    gap = (stored.flatten() - value.flatten().to(stored.dtype)).abs()
    unit = absmax.repeat_interleave(block_size)[: gap.numel()]
    return float((gap / unit.clamp_min(torch.finfo(unit.dtype).tiny)).max())


def _is_product(node: fx.Node, weight: fx.Node) -> bool:
    return node.target in _PRODUCTS and not node.kwargs and _operands(node)[1] is weight


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
