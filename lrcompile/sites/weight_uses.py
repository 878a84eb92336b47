"""Where an FX graph uses a weight, and whether each use is a linear map: the one matching rule for every granularity.

    F.linear(x, W)  x @ W  x.matmul(Wᵀ)  torch.mm/bmm(x, W)  torch.addmm(b, x, W)  F.embedding(ids, W)

with any chain of casts and transposes of W in between, as written by hand, symbolically traced, or captured by
`torch.export`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import fx

aten = torch.ops.aten

_LINEAR = {F.linear, aten.linear.default}
_PRODUCT = {operator.matmul, torch.matmul, torch.mm, torch.bmm, aten.matmul.default, aten.mm.default, aten.bmm.default}
_PRODUCT_METHODS = {"matmul", "mm", "bmm", "__matmul__"}
_SUM_PRODUCT = {torch.addmm, aten.addmm.default, torch.baddbmm, aten.baddbmm.default}
_CASTS = {
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default, aten.type_as.default,
    aten.contiguous.default, aten.clone.default, aten.detach.default, aten.alias.default,
}  # fmt: skip
_CAST_METHODS = {"to", "float", "double", "half", "bfloat16", "type", "type_as", "contiguous", "detach"}
_FLIPS: dict[Any, Callable[[tuple, int], bool]] = {
    torch.t: lambda args, ndim: True,
    aten.t.default: lambda args, ndim: True,
    aten.mT.default: lambda args, ndim: True,
    aten.numpy_T.default: lambda args, ndim: ndim == 2,
    torch.transpose: lambda args, ndim: _last_two(args, ndim),
    aten.transpose.int: lambda args, ndim: _last_two(args, ndim),
    torch.permute: lambda args, ndim: _permutes_last_two(args, ndim),
    aten.permute.default: lambda args, ndim: _permutes_last_two(args, ndim),
}
_FLIP_METHODS: dict[str, Callable[[tuple, int], bool]] = {
    "t": lambda args, ndim: True,
    "transpose": lambda args, ndim: _last_two(args, ndim),
    "permute": lambda args, ndim: _permutes_last_two(args, ndim),
}
_HARMLESS_ATTRIBUTES = {"shape", "dtype", "device", "ndim", "requires_grad", "is_cuda"}
_HARMLESS_METHODS = {"size", "dim", "numel", "is_floating_point", "get_device"}
_KIND_OF_OTHER = {"to", "type_as", aten.to.other, aten.type_as.default}
"""`x.to(W)`: W says only of which kind the result is."""
_HARMLESS = {aten.sym_size.int, aten._assert_tensor_metadata.default}


class NotALinearMap(Exception):
    """A use of the weight that is no linear map; carries the reason and the node."""

    def __init__(self, reason: str, node: fx.Node):
        super().__init__(reason)
        self.reason, self.node = reason, node


@dataclass(frozen=True)
class Use:
    """One product: `node` computes it, `x` is what the weight multiplies (or the indices it is read at)."""

    node: fx.Node
    x: Any
    form: Literal["product", "lookup"]
    transposed: bool
    """The weight is stored as [in, out] for this use."""
    padding_idx: int | None = None


def reads_of(graph: fx.Graph) -> dict[str, list[fx.Node]]:
    """By attribute: the nodes that read it."""
    found: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            found.setdefault(str(node.target), []).append(node)
    return found


def uses_of(reads: Iterable[fx.Node], shape: Sequence[int]) -> list[Use]:
    """Every use of a weight of this shape that these nodes read; raises `NotALinearMap` when one is something else, or
    when they disagree.
    """
    found: list[Use] = []
    for node in reads:
        found += _follow(node, shape, flipped=False)
    for use in found[1:]:
        if (use.form, use.transposed) != (found[0].form, found[0].transposed):
            raise NotALinearMap(
                "it is used both as stored and transposed, so one pair of factors cannot serve both uses", use.node
            )
    return found


def _follow(node: fx.Node, shape: Sequence[int], flipped: bool) -> Iterator[Use]:
    for user in node.users:
        if _is_harmless(user, node):
            continue
        if _is_cast(user, node):
            yield from _follow(user, shape, flipped)
        elif (flip := _flip(user, node, len(shape))) is not None:
            if not flip:
                raise NotALinearMap("it is rearranged by more than a transpose", user)
            yield from _follow(user, shape, not flipped)
        else:
            yield _product(user, node, shape, flipped)


def _product(user: fx.Node, weight: fx.Node, shape: Sequence[int], flipped: bool) -> Use:
    args = user.args
    called = user.target if user.op == "call_function" else None
    if user.kwargs.get("out") is not None:
        raise NotALinearMap("its product is written into a given tensor (out=), past any adapter", user)
    if called in _LINEAR and _is(user, 1, "weight", weight):
        return Use(user, _argument(user, 0, "input"), "product", transposed=flipped)
    product = called in _PRODUCT or (user.op == "call_method" and user.target in _PRODUCT_METHODS)
    if product and len(args) == 2 and args[1] is weight and args[0] is not weight:
        return Use(user, args[0], "product", transposed=not flipped)
    if called in _SUM_PRODUCT and len(args) >= 3 and args[2] is weight and args[1] is not weight:
        if user.kwargs.get("alpha", 1) != 1:
            raise NotALinearMap("its product is scaled by alpha in addmm", user)
        return Use(user, args[1], "product", transposed=not flipped)
    if called is F.embedding and _is(user, 1, "weight", weight) and not flipped:
        if user.kwargs.get("max_norm") is not None or (len(args) > 3 and args[3] is not None):
            raise NotALinearMap("max_norm rewrites its rows at each lookup", user)
        padding: Any = user.kwargs.get("padding_idx", args[2] if len(args) > 2 else None)
        if isinstance(padding, int):
            padding %= shape[0]
        return Use(user, _argument(user, 0, "input"), "lookup", transposed=True, padding_idx=padding)
    if called is aten.embedding.default and args[0] is weight and not flipped:
        padding = args[2] if len(args) > 2 and args[2] != -1 else None
        return Use(user, args[1], "lookup", transposed=True, padding_idx=padding)
    if product or called in _LINEAR:
        raise NotALinearMap("it is the left factor of a product, or both factors", user)
    raise NotALinearMap(f"it is used by {_describe(user)}, which is no linear map of an input", user)


def _argument(node: fx.Node, position: int, keyword: str) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs[keyword]


def _is(node: fx.Node, position: int, keyword: str, value: fx.Node) -> bool:
    given = node.args[position] if len(node.args) > position else node.kwargs.get(keyword)
    return given is value and sum(each is value for each in node.all_input_nodes) == 1


def _is_harmless(user: fx.Node, weight: fx.Node) -> bool:
    """Does `user` read what kind of tensor the weight is, not its values?"""
    if user.op == "call_function" and user.target is getattr:
        return user.args[1] in _HARMLESS_ATTRIBUTES
    if user.op != "call_module" and user.target in _KIND_OF_OTHER and user.args[0] is not weight:
        return weight in user.args[1:] or weight in user.kwargs.values()
    return (user.op == "call_method" and user.target in _HARMLESS_METHODS) or user.target in _HARMLESS


def _is_cast(user: fx.Node, weight: fx.Node) -> bool:
    if not user.args or user.args[0] is not weight:
        return False
    return (user.op == "call_method" and user.target in _CAST_METHODS) or user.target in _CASTS


def _flip(user: fx.Node, weight: fx.Node, ndim: int) -> bool | None:
    """True: swaps the last two dimensions; False: rearranges otherwise; None: no rearrangement at all."""
    if not user.args or user.args[0] is not weight:
        return None
    if user.op == "call_function" and user.target is getattr and user.args[1] in ("T", "mT"):
        return user.args[1] == "mT" or ndim == 2
    rule = _FLIPS.get(user.target) if user.op == "call_function" else _FLIP_METHODS.get(str(user.target))
    return None if rule is None or (user.op not in ("call_function", "call_method")) else rule(user.args[1:], ndim)


def _last_two(dims: tuple, ndim: int) -> bool:
    return sorted(dim % ndim for dim in dims) == [ndim - 2, ndim - 1]


def _permutes_last_two(dims: tuple, ndim: int) -> bool:
    order = dims[0] if len(dims) == 1 and isinstance(dims[0], (list, tuple)) else dims
    return [dim % ndim for dim in order] == [*range(ndim - 2), ndim - 1, ndim - 2]


def _describe(node: fx.Node) -> str:
    if node.op == "output":
        return "the graph's output"
    name = getattr(node.target, "__name__", None) or str(node.target)
    return f"`{name}`"
