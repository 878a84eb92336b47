"""Folding adapter nodes into the tensors of the product they act on: what the merge passes share.

A pass says which node it takes and what that does to the product's weight and bias (`Fold`s of `Part`s); here the node
is erased, the changes wait as pending tensors, and other uses of the same numbers keep them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from lrcompile.passes.base import Pending, Program, Refusal, Result, Update
from lrcompile.passes.nodes import site_of, tidy
from lrcompile.passes.tensors import RESHAPES, Tensors, View, substitute

aten = torch.ops.aten

_PRODUCT = {aten.matmul.default, aten.mm.default, aten.bmm.default}
_SUM_PRODUCT = {aten.addmm.default, aten.baddbmm.default}


class NotFoldable(Exception):
    """Why a node stays, in words that go with the site's name."""


@dataclass(frozen=True)
class Product:
    """A product with one weight, or a lookup in it, whose result nothing but the adapter reads."""

    node: fx.Node
    given: Any
    weight: fx.Node
    view: View
    bias: fx.Node | None
    transposed: bool
    """The weight is read as `[in, out]`."""


@dataclass(frozen=True)
class Part:
    """One argument of a product, and the change to the tensor it reads."""

    node: fx.Node
    update: Update


@dataclass(frozen=True)
class Fold:
    """An adapter node, the product it acts on, what becomes of that, and what tells it from another adapter."""

    node: fx.Node
    product: fx.Node
    parts: tuple[Part, ...]
    key: tuple[Any, ...]
    gone: tuple[fx.Node, ...] = ()
    """Further nodes that only serve the adapter."""


Match = Callable[[fx.Node, Tensors, Program], Fold | None]
"""The fold of a node, None for a node the pass is not about; raises `NotFoldable`."""


def fold_all(program: Program, match: Match) -> Result:
    """Fold whatever `match` takes, from the products outwards: what sits on an adapter comes when that is folded."""
    tensors = Tensors(program.exported)
    count = 0
    found, refusals = _layer(program, tensors, match)
    while found:
        _erase(program, tensors, found)
        count += len(found)
        found, refusals = _layer(program, tensors, match)
    if count:
        tidy(program.exported)
    return Result(count, refusals)


def product_below(y: Any, tensors: Tensors, lookup: bool = False) -> Product:
    """The product with a held weight that gives `y`; nothing else may read its result on the way there."""
    product, passed = through_reshapes(y)
    if not isinstance(product, fx.Node) or product.op != "call_function":
        raise NotFoldable("its base output is not computed by this model")
    for each in (product, *passed):
        if len(each.users) != 1:
            raise NotFoldable("the base output is used a second time, without the adapter")
    bias: Any = None
    if lookup and product.target is aten.embedding.default:
        weight, given, transposed = product.args[0], product.args[1], True
    elif not lookup and product.target is aten.linear.default:
        given, weight, bias, transposed = product.args[0], product.args[1], (*product.args, None)[2], False
    elif not lookup and product.target in _PRODUCT:
        (given, weight), transposed = product.args, True
    elif not lookup and product.target in _SUM_PRODUCT and not product.kwargs:
        (bias, given, weight), transposed = product.args, True
    else:
        raise NotFoldable(f"its base output comes from {product.target}, not from a product with one weight")
    view = tensors.view(weight)
    if view is None or not isinstance(weight, fx.Node):
        raise NotFoldable("its weight is computed, not held")
    return Product(product, given, weight, view, bias, transposed)


def through_reshapes(node: Any) -> tuple[Any, list[fx.Node]]:
    """What is below changes of shape alone, and those."""
    passed: list[fx.Node] = []
    while isinstance(node, fx.Node) and node.op == "call_function" and node.target in RESHAPES:
        passed.append(node)
        node = node.args[0]
    return node, passed


def place(view: View, transposed: bool, tensors: Tensors) -> tuple[Any, ...]:
    """Where the numbers lie that a view reads as `[out, in]`, or as `[in, out]` if `transposed`.

    A tensor that an earlier fold gave to one use alone still holds the numbers of the one it was copied from.
    """
    part = view.of(tensors.get(view.source))
    part = part.mT if transposed else part
    return (part.data_ptr(), part.dtype, part.stride(), part.shape)


def require_same_input(product: Product, x: Any) -> None:
    if through_reshapes(product.given)[0] is not through_reshapes(x)[0]:
        raise NotFoldable("it reads another input than its base does")


def held_values(tensors: Tensors, nodes: Any, what: str = "factors") -> list[Any]:
    values = [tensors.value(each) for each in nodes]
    if any(value is None for value in values):
        raise NotFoldable(f"its {what} depend on an input")
    return values


def _layer(program: Program, tensors: Tensors, match: Match) -> tuple[list[Fold], tuple[Refusal, ...]]:
    """The nodes that sit on their product now, and why the others do not."""
    found: list[Fold] = []
    refusals: list[Refusal] = []
    for node in program.exported.graph.nodes:
        if node.op != "call_function":
            continue
        try:
            fold = match(node, tensors, program)
        except NotFoldable as reason:
            refusals.append(Refusal(site_of(node, tensors), str(reason)))
        else:
            found += [] if fold is None else [fold]
    return found, tuple(refusals)


def _erase(program: Program, tensors: Tensors, found: list[Fold]) -> None:
    by_source: dict[fx.Node, list[tuple[Fold, Part]]] = {}
    for fold in found:
        for part in fold.parts:
            by_source.setdefault(part.update.view.source, []).append((fold, part))
    gone = {node for fold in found for node in (fold.node, *fold.gone)}
    for source, parts in by_source.items():
        groups: dict[tuple[Any, ...], list[tuple[Fold, Part]]] = {}
        for fold, part in parts:
            groups.setdefault((*part.update.view.key(), *fold.key), []).append((fold, part))
        target = tensors.targets[source.name]
        adapted = {fold.product: key for key, group in groups.items() for fold, _ in group}
        if _disjoint(source, adapted, gone, tensors):
            _record(program, tensors, source, target, [group[0][1].update for group in groups.values()])
            continue
        for group in groups.values():  # another use must keep these numbers: the adapted uses get a tensor of their own
            update = group[0][1].update
            copy = tensors.add(f"{target}_adapted", tensors.get(source), before=source)
            if target in program.pending:
                program.pending[tensors.targets[copy.name]] = program.pending[target]
            own = replace(update, view=View(copy, update.view.steps))
            _record(program, tensors, copy, tensors.targets[copy.name], [own])
            for fold, part in group:
                with program.exported.graph.inserting_before(fold.product):
                    fold.product.replace_input_with(part.node, part.update.view.rebuilt(copy))
    for fold in found:
        substitute(program.exported, fold.node, fold.node.args[0])  # type: ignore[arg-type]


def _record(program: Program, tensors: Tensors, source: fx.Node, target: str, updates: list[Update]) -> None:
    pending = program.pending.get(target)
    if pending is None:
        base = tensors.get(source)
        pending = Pending(lambda: base, base.dtype, base.shape)
    program.pending[target] = replace(pending, updates=(*pending.updates, *updates))


def _disjoint(source: fx.Node, adapted: dict[fx.Node, Any], gone: set[fx.Node], tensors: Tensors) -> bool:
    """Does no part of the tensor serve two uses that are to see different numbers?"""
    spans: list[tuple[int, int, Any]] = []

    def visit(node: fx.Node) -> None:
        for user in node.users:
            view = tensors.view(user)
            if view is not None:
                visit(user)
            elif user.target is not operator.getitem and user not in gone:
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
