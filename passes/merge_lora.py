"""merge-lora: xWᵀ + s·(xAᵀ)Bᵀ = x(W + s·BA)ᵀ, one weight at a time and only when that weight is written.

    W' = round(W + Σ s·B·A)        accumulated in float32 (float64 for a float64 W), rounded once to W's dtype

The graph loses its adapter nodes at once; the sums are pending, so that a writer holds one folded weight at most.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from lrcompile.passes.base import Equivalence, Pass, Pending, Program, Refusal, Result, Update
from lrcompile.passes.nodes import ADAPTERS, EXPERTS, LOOKUP, LORA, site_of, tidy
from lrcompile.passes.tensors import RESHAPES, Tensors, View, substitute

aten = torch.ops.aten

_LINEAR = {aten.linear.default}
_PRODUCT = {aten.matmul.default, aten.mm.default, aten.bmm.default}
_SUM_PRODUCT = {aten.addmm.default, aten.baddbmm.default}


@dataclass(frozen=True)
class MergeLora(Pass):
    """xWᵀ + s·(xAᵀ)Bᵀ = x(W + s·BA)ᵀ: one product instead of three, at a rounding of W to its dtype.

    Takes every adapter whose base is a product with, or lookup in, one weight. Refuses where folding would change what
    the model computes: a base output used elsewhere too, a computed weight, another input. A weight that has other
    uses, not adapted or adapted differently, gets its own copy.
    """

    name: ClassVar[str] = "merge-lora"
    preserves: ClassVar[Equivalence] = "cast"

    def apply(self, program: Program) -> Result:
        tensors = Tensors(program.exported)
        refusals: dict[fx.Node, Refusal] = {}
        count = 0
        while found := _next_layer(program, tensors, refusals):
            _erase(program, tensors, found)
            count += len(found)
        if count:
            tidy(program.exported)
        return Result(count, tuple(refusals.values()))


class _NotFoldable(Exception):
    pass


@dataclass(frozen=True)
class _Fold:
    node: fx.Node  # the adapter
    base: fx.Node  # the product or lookup it adds to
    weight: fx.Node  # that node's argument
    update: Update

    def key(self) -> tuple[Any, ...]:
        return (*self.update.view.key(), *self.node.args[2:])


def _next_layer(program: Program, tensors: Tensors, refusals: dict[fx.Node, Refusal]) -> list[_Fold]:
    """The adapters that sit directly on their base; those stacked on another come in the next round."""
    found: list[_Fold] = []
    for node in program.exported.graph.nodes:
        if node.target not in ADAPTERS or node in refusals or _is_stacked(node, found):
            continue
        try:
            found.append(_match(node, tensors))
        except _NotFoldable as reason:
            refusals[node] = Refusal(site_of(node, tensors), str(reason))
    return found


def _is_stacked(node: fx.Node, found: list[_Fold]) -> bool:
    return any(fold.node is _through_reshapes(node.args[0])[0] for fold in found)


def _through_reshapes(node: Any) -> tuple[Any, list[fx.Node]]:
    passed: list[fx.Node] = []
    while isinstance(node, fx.Node) and node.op == "call_function" and node.target in RESHAPES:
        passed.append(node)
        node = node.args[0]
    return node, passed


def _match(node: fx.Node, tensors: Tensors) -> _Fold:
    if node.target is EXPERTS:
        raise _NotFoldable("its base is a stack of experts, each row's weight chosen by its router")
    y, x, *factors = node.args[:5]
    base, passed = _through_reshapes(y)
    if node.target is LORA and len(node.args) > 5 and node.args[5]:
        raise _NotFoldable("its dropout is active")
    if not isinstance(base, fx.Node) or base.op != "call_function":
        raise _NotFoldable("its base output is not computed by this model")
    for each in (base, *passed):
        if len(each.users) != 1:
            raise _NotFoldable("the base output is used a second time, without the adapter")
    if node.target is LOOKUP and base.target is aten.embedding.default:
        weight, given, transposed = base.args[0], base.args[1], True
    elif node.target is LORA and base.target in _LINEAR:
        given, weight, transposed = base.args[0], base.args[1], False
    elif node.target is LORA and base.target in _PRODUCT:
        (given, weight), transposed = base.args, True
    elif node.target is LORA and base.target in _SUM_PRODUCT and not base.kwargs:
        (_, given, weight), transposed = base.args, True
    else:
        raise _NotFoldable(f"its base output comes from {base.target}, not from a product with one weight")
    if _through_reshapes(given)[0] is not _through_reshapes(x)[0]:
        raise _NotFoldable("it reads another input than its base does")
    view = tensors.view(weight)
    if view is None or not isinstance(weight, fx.Node):
        raise _NotFoldable("its weight is computed, not held")
    values = [tensors.value(each) for each in factors]
    if any(value is None for value in values):
        raise _NotFoldable("its factors depend on an input")
    A, B, scale = values
    expected = torch.Size((*B.shape[:-1], A.shape[-1]))  # type: ignore[union-attr]
    shape = weight.meta["val"].shape
    if shape != (torch.Size((*expected[:-2], expected[-1], expected[-2])) if transposed else expected):
        raise _NotFoldable(f"its update is {tuple(expected)}, the weight it acts beside is {tuple(shape)}")
    return _Fold(node, base, weight, Update(view, A, B, scale, transposed))  # type: ignore[arg-type]


def _erase(program: Program, tensors: Tensors, found: list[_Fold]) -> None:
    by_source: dict[fx.Node, list[_Fold]] = {}
    for fold in found:
        by_source.setdefault(fold.update.view.source, []).append(fold)
    for source, folds in by_source.items():
        groups: dict[tuple[Any, ...], list[_Fold]] = {}
        for fold in folds:
            groups.setdefault(fold.key(), []).append(fold)
        target = tensors.targets[source.name]
        if _disjoint(source, folds, tensors):
            _record(program, tensors, source, target, [group[0].update for group in groups.values()])
        else:  # another use of these numbers must keep them: the adapted uses get a weight of their own
            for group in groups.values():
                copy = tensors.add(f"{target}_adapted", tensors.get(source), before=source)
                own = View(copy, group[0].update.view.steps)
                if target in program.pending:
                    program.pending[tensors.targets[copy.name]] = program.pending[target]
                _record(program, tensors, copy, tensors.targets[copy.name], [replace(group[0].update, view=own)])
                for fold in group:
                    _rebase(program, fold, copy)
        for fold in folds:
            substitute(program.exported, fold.node, fold.node.args[0])  # type: ignore[arg-type]


def _record(program: Program, tensors: Tensors, source: fx.Node, target: str, updates: list[Update]) -> None:
    pending = program.pending.get(target)
    if pending is None:
        base = tensors.get(source)
        pending = Pending(lambda: base, base.dtype, base.shape)
    program.pending[target] = replace(pending, updates=(*pending.updates, *updates))


def _rebase(program: Program, fold: _Fold, copy: fx.Node) -> None:
    with program.exported.graph.inserting_before(fold.base):
        fold.base.replace_input_with(fold.weight, fold.update.view.rebuilt(copy))


def _disjoint(source: fx.Node, folds: list[_Fold], tensors: Tensors) -> bool:
    """Does no part of the tensor serve two uses that are to see different numbers?"""
    adapted = {fold.base: fold.key() for fold in folds}
    spans: list[tuple[int, int, Any]] = []

    def visit(node: fx.Node) -> None:
        for user in node.users:
            view = tensors.view(user)
            if view is not None:
                visit(user)
            elif user.target is not operator.getitem:
                spans.append((*_span(source, tensors.view(node)), adapted.get(user)))

    visit(source)
    return all(
        one[2] == other[2] or one[1] <= other[0] or other[1] <= one[0]
        for index, one in enumerate(spans)
        for other in spans[:index]
    )


def _span(source: fx.Node, view: View | None) -> tuple[int, int]:
    """First and one-past-last element of the storage that a view can touch."""
    part = torch.empty(tuple(source.meta["val"].shape), device="meta")
    part = part if view is None else view.of(part)
    first = int(part.storage_offset())
    return first, first + 1 + sum((size - 1) * stride for size, stride in zip(part.shape, part.stride(), strict=True))
