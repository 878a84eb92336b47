"""fuse-by-input: x·W₁ᵀ + b₁, x·W₂ᵀ + b₂, … = split(x·[W₁; W₂; …]ᵀ + [b₁; b₂; …])."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from lrcompile.kernels.nf4_dequant import decode_absmax
from lrcompile.passes.base import Equivalence, Pass, Pending, Program, Refusal, Result
from lrcompile.passes.nodes import INTEGER_LINEAR, NF4_LINEAR, held_nf4, tidy
from lrcompile.passes.tensors import Tensors, substitute

aten = torch.ops.aten


@dataclass(frozen=True)
class FuseByInput(Pass[Program]):
    """x·W₁ᵀ, x·W₂ᵀ, … = split(x·[W₁; W₂; …]ᵀ): query, key and value; gate and up; the first factors of adapters.

    Float weights, integers of one kind (their blocks lie within a row) and NF4 codes, where every weight but the last
    fills whole blocks: codes and maxima are then those of the stacked weight, bit for bit, maxima in float32. Refuses
    NF4 weights that end within a block, and weights that are used elsewhere or computed. A map without a bias beside
    one with gets zeros. No part of the deploy pipeline: on a CPU ONNX Runtime 1.31 takes 2 to 11 % longer over the one
    float32 product and the split behind it than over the several (512 rows; as long for one row; integers 6 % less for
    one row, 5 % more for many).
    """

    name: ClassVar[str] = "fuse-by-input"
    preserves: ClassVar[Equivalence] = "reassociation"

    def apply(self, program: Program) -> Result:
        tensors, refusals, count = Tensors(program.exported), [], 0
        groups: dict[Any, list[_Map]] = {}
        for node in program.exported.graph.nodes:
            if node.target in _READERS and not node.kwargs:
                found = _READERS[node.target](node, tensors)
                if isinstance(found, Refusal):
                    refusals.append(found)
                else:
                    groups.setdefault(found.key, []).append(found)
        for maps in groups.values():
            if len(maps) == 1:
                continue
            maps, late = _whole_blocks(maps)
            refusals += late
            if len(maps) > 1:
                _fuse(program, tensors, maps)
                count += len(maps)
        if count:
            tidy(program.exported)
        return Result(count, tuple(refusals))


@dataclass(frozen=True)
class _Map:
    """One linear map on a held weight; those of one `key` may be stacked."""

    node: fx.Node
    key: tuple[Any, ...]
    held: tuple[fx.Node | None, ...]
    bias: fx.Node | None
    out_features: int
    ends_in_block: bool = False
    """The last block of its codes is short, so none may follow."""


def _float(node: fx.Node, tensors: Tensors) -> _Map | Refusal:
    x, weight, bias = (*node.args, None)[:3]
    assert isinstance(weight, fx.Node)
    if reason := _reason((weight, bias), tensors):
        return Refusal(node.name, reason)
    value = weight.meta["val"]
    if value.dim() != 2:
        return Refusal(node.name, "its weight is no matrix")
    return _Map(node, (node.target, x, value.dtype, value.shape[1]), (weight,), bias, value.shape[0])  # type: ignore[arg-type]


def _integers(node: fx.Node, tensors: Tensors) -> _Map | Refusal:
    x, codes, scales, bias, *how = node.args
    if reason := _reason((codes, scales, bias), tensors):
        return Refusal(node.name, reason)
    return _Map(node, (node.target, x, *how), (codes, scales), bias, len(codes.meta["val"]))  # type: ignore[arg-type, union-attr]


def _nf4(node: fx.Node, tensors: Tensors) -> _Map | Refusal:
    x, *held, bias, out, inside, block, transposed, dtype = node.args
    if reason := _reason((*held, bias), tensors):
        return Refusal(node.name, reason)
    if transposed:
        return Refusal(node.name, "its codes are stored as [in, out], where blocks of different maps would mix")
    return _Map(node, (node.target, x, inside, block, dtype), tuple(held), bias, out, bool(out * inside % block))  # type: ignore[arg-type, operator]


_READERS: dict[Any, Callable[[fx.Node, Tensors], _Map | Refusal]] = {
    aten.linear.default: _float,
    INTEGER_LINEAR: _integers,
    NF4_LINEAR: _nf4,
}


def _reason(held: Sequence[Any], tensors: Tensors) -> str | None:
    given = [each for each in held if each is not None]
    if any(tensors.target(each) is None for each in given):
        return "its weight or bias is computed, or an input"
    if any(len(each.users) != 1 for each in given):
        return "its weight or bias is used elsewhere too"
    return None


def _whole_blocks(maps: list[_Map]) -> tuple[list[_Map], list[Refusal]]:
    """Those that can follow each other, and why others cannot: at most one may end within a block, and comes last."""
    whole, short = [each for each in maps if not each.ends_in_block], [each for each in maps if each.ends_in_block]
    reason = "its NF4 codes end within a block, so only one such map can be stacked, as the last"
    refused = [Refusal(each.node.name, reason) for each in short[1:]]
    return whole + short[:1], refused


def _fuse(program: Program, tensors: Tensors, maps: list[_Map]) -> None:
    graph = program.exported.graph
    nodes = [each.node for each in maps]
    first = next(node for node in graph.nodes if node in nodes)
    held, bias = _stacked(program, tensors, maps), _stacked_bias(tensors, maps)
    sizes = [each.out_features for each in maps]
    whole = sum(sizes)
    with graph.inserting_before(first):
        if first.target is aten.linear.default:
            arguments: tuple[Any, ...] = (first.args[0], *held, bias)
        elif first.target is INTEGER_LINEAR:
            arguments = (first.args[0], *held, bias, *first.args[4:])
        else:
            arguments = (first.args[0], *held, bias, whole, *first.args[7:])
        product = graph.call_function(first.target, arguments)
        value = first.meta["val"]
        product.meta = {**first.meta, "val": value.new_empty((*value.shape[:-1], whole))}
        split = graph.call_function(aten.split_with_sizes.default, (product, sizes, -1))
        split.meta = {"val": tuple(node.meta["val"] for node in nodes)}
        parts = []
        for index, node in enumerate(nodes):
            part = graph.call_function(operator.getitem, (split, index))
            part.meta = dict(node.meta)
            parts.append(part)
    for node, part in zip(nodes, parts, strict=True):
        substitute(program.exported, node, part)


def _stacked(program: Program, tensors: Tensors, maps: list[_Map]) -> list[fx.Node | None]:
    before = maps[0].held[0]
    assert before is not None
    name = "_and_".join(tensors.targets[each.held[0].name] for each in maps)  # type: ignore[union-attr]
    if maps[0].node.target is aten.linear.default:
        weights = [_weight(program, tensors, each.held[0]) for each in maps]
        shape = torch.Size((sum(each.out_features for each in maps), before.meta["val"].shape[1]))
        made = tensors.add(name, torch.empty(shape, dtype=before.meta["val"].dtype), before)
        program.pending[tensors.targets[made.name]] = Pending(
            lambda: torch.cat([weight() for weight in weights]), before.meta["val"].dtype, shape
        )
        return [made]
    if maps[0].node.target is INTEGER_LINEAR:
        columns = zip(*([tensors.get(node) for node in each.held if node is not None] for each in maps), strict=True)
        parts = [torch.cat(column) for column in columns]
        return [tensors.add(f"{name}_{what}", part, before) for what, part in zip(("", "scales"), parts, strict=True)]
    stored = [held_nf4(tensors, each.held) for each in maps]
    codes, maxima = torch.cat([each.codes for each in stored]), torch.cat([decode_absmax(each) for each in stored])
    return [tensors.add(name, codes, before), tensors.add(f"{name}_absmax", maxima, before), None, None]


def _weight(program: Program, tensors: Tensors, node: Any) -> Callable[[], Tensor]:
    pending = program.pending.pop(tensors.targets[node.name], None)
    value = tensors.get(node)
    return pending if pending is not None else lambda: value


def _stacked_bias(tensors: Tensors, maps: list[_Map]) -> fx.Node | None:
    present = [each.bias for each in maps if each.bias is not None]
    if not present:
        return None
    like = tensors.get(present[0])
    parts = [like.new_zeros(each.out_features) if each.bias is None else tensors.get(each.bias) for each in maps]
    name = "_and_".join(tensors.targets[node.name] for node in present)
    return tensors.add(name, torch.cat(parts), present[0])
