"""The product of each row with the weight its expert has, y_t = x_t·W[e_t]ᵀ + b[e_t]: what an expert's pair sits on."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lrcompile.passes.folding import NotFoldable, Product
from lrcompile.passes.tensors import Tensors

aten = torch.ops.aten

_SUMS = (aten.add.Tensor, aten.add_.Tensor)


def product_of_experts(y: Any, experts: Any, tensors: Tensors) -> Product:
    """The gathering of a held stack `W[experts]` and the row it multiplies; nothing else may read what lies between.

    Raises NotFoldable where `y` is computed in another way, or by other experts than the adapter's.
    """
    if _is(y, *_SUMS) and _is(y.args[1], aten.index.Tensor):
        _require(_only_use(y) and _chosen_by(y.args[1], experts), "its bias is another's")
        y = y.args[0]
    _require(_is(y, aten.squeeze.dim) and _is(y.args[0], aten.bmm.default), "its base output is no gathered product")
    product = y.args[0]
    transposed = _is(product.args[1], aten.index.Tensor)
    given, gathered = product.args if transposed else reversed(product.args)
    _require(_is(gathered, aten.index.Tensor), "its base output is no product with gathered weights")
    _require(_chosen_by(gathered, experts), "its base takes other experts' weights")
    _require(all(map(_only_use, (y, product, gathered))), "the base output is used a second time, without the adapter")
    weight = gathered.args[0]
    view = tensors.view(weight)
    if view is None:
        raise NotFoldable("its weight is computed, not held")
    return Product(gathered, given, weight, view, None, transposed)


def _is(node: Any, *targets: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def _chosen_by(gathered: fx.Node, experts: Any) -> bool:
    return list(gathered.args[1]) == [experts]  # type: ignore[arg-type]


def _only_use(node: fx.Node) -> bool:
    return len(node.users) == 1


def _require(holds: bool, reason: str) -> None:
    if not holds:
        raise NotFoldable(reason)
