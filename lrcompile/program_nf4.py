"""NF4 in a captured program: quantize weights that are about to be written, or spell quantized ones out again."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from lrcompile import dialect_nf4 as dialect_nf4  # registers torch.ops.lrcompile.nf4_linear
from lrcompile.errors import ExportError
from lrcompile.folding import LORA, Recipe
from lrcompile.kernels.nf4_linear import Nf4, decode_absmax, dequantize_nf4, quantize_nf4
from lrcompile.programs import Tensors, substitute
from lrcompile.sites.linear import conv1d
from lrcompile.targeting import is_router, output_heads

aten = torch.ops.aten
NF4_LINEAR = torch.ops.lrcompile.nf4_linear.default
_PRODUCTS = (aten.linear.default, aten.addmm.default)


def nf4_sites(program: ExportedProgram) -> list[str]:
    """The linear maps of the program whose weight is stored as NF4."""
    tensors = Tensors(program)
    found = [tensors.targets[node.args[1].name] for node in program.graph.nodes if node.target is NF4_LINEAR]
    return list(dict.fromkeys(name.removesuffix("_codes").removesuffix(".weight") for name in found))


def quantize_program(
    program: ExportedProgram, model: nn.Module, recipes: Mapping[str, Recipe], block_size: int = 64
) -> dict[str, Recipe]:
    """Store as NF4 what `lrcompile.quantize` would: linear maps of `model` but heads, routers and shared weights.

    Each weight is computed, quantized and dropped before the next one. Returns the recipes still needed.
    """
    tensors, left = Tensors(program), dict(recipes)
    spared = output_heads(model)
    for weight in list(program.graph.nodes):
        name = str(tensors.target(weight)).removesuffix(".weight")
        products = list(weight.users)
        if name in spared or not _may_store(model, name) or not all(_is_product(node, weight) for node in products):
            continue
        recipe = left.pop(tensors.targets[weight.name], None)
        _store(program, tensors, weight, recipe() if recipe else tensors.get(weight), products, block_size)
    program.graph.eliminate_dead_code()
    program.graph.lint()
    program.graph_module.recompile()
    if not nf4_sites(program):
        raise ExportError("quantize='nf4': the model has no linear map that can be stored so")
    return left


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


def _store(
    program: ExportedProgram, tensors: Tensors, weight: fx.Node, value: torch.Tensor, products: list[fx.Node],
    block_size: int,
) -> None:  # fmt: skip
    target = tensors.targets[weight.name]
    try:
        nf4 = quantize_nf4(value, block_size)  # double quantization too: the same numbers as `lrcompile.quantize`
    except ValueError as error:
        raise ExportError(f"{target} cannot be stored as NF4: {error}") from error
    codes = tensors.add(f"{target}_codes", nf4.codes, weight)
    absmax = tensors.add(f"{target}_absmax", decode_absmax(nf4), weight)
    for node in products:
        x, _, bias = _operands(node)
        transposed = node.target is aten.addmm.default
        in_features, out_features = value.shape if transposed else value.shape[::-1]
        with program.graph.inserting_before(node):
            stored = program.graph.call_function(
                NF4_LINEAR,
                (x, codes, absmax, None, None, bias, out_features, in_features, block_size, transposed, value.dtype),
            )
        stored.meta = dict(node.meta)
        substitute(program, node, stored)


def spell_out_adapted(program: ExportedProgram, into: torch.dtype) -> dict[str, Recipe]:
    """Turn every NF4 linear map that an adapter adds to into a plain one; its weight, in `into`, is a recipe."""
    tensors, recipes = Tensors(program), {}
    for node in list(program.graph.nodes):
        if node.target is not NF4_LINEAR or not any(user.target is LORA for user in node.users):
            continue
        x, codes, absmax, scale, offset, bias, out_features, in_features, block_size, transposed, _ = node.args
        second = (None, None) if scale is None else (tensors.get(scale), tensors.get(offset))
        nf4 = Nf4(tensors.get(codes), tensors.get(absmax), *second)
        shape = torch.Size((in_features, out_features) if transposed else (out_features, in_features))
        name = tensors.targets[codes.name].removesuffix("_codes")
        # the program needs a tensor of this shape and dtype to refer to; one element, expanded, costs no memory
        weight = tensors.add(name, torch.empty(1, dtype=into).expand(shape), codes)
        recipes[tensors.targets[weight.name]] = Recipe(
            partial(dequantize_nf4, nf4, tuple(shape), block_size), into, shape
        )
        with program.graph.inserting_before(node):
            read = weight
            if transposed:
                read = _call(program, aten.t.default, (read,))
            # written in `into`, read in the activations' dtype
            if into != node.meta["val"].dtype:
                read = _call(program, aten.to.dtype, (read, node.meta["val"].dtype))
            linear = program.graph.call_function(aten.linear.default, (x, read, bias))
        linear.meta = dict(node.meta)
        substitute(program, node, linear)
    program.graph.eliminate_dead_code()
    program.graph.lint()
    program.graph_module.recompile()
    return recipes


def _call(program: ExportedProgram, target: Any, args: tuple[Any, ...]) -> fx.Node:
    node = program.graph.call_function(target, args)
    node.meta = {"val": target(*(each.meta["val"] if isinstance(each, fx.Node) else each for each in args))}
    return node
