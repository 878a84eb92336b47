"""Where a gain on inputs acts: P(x) + P(x ⊙ (g − 1)), P one linear map, its bias in the first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lrcompile.passes.folding import NotFoldable, through_reshapes
from lrcompile.passes.nodes import NF4_LINEAR

aten = torch.ops.aten

_INPUT = {aten.linear.default: 0, aten.addmm.default: 1, aten.matmul.default: 0, aten.mm.default: 0, NF4_LINEAR: 0}
"""Products of activations with a weight, and which of their arguments the activations are."""


@dataclass(frozen=True)
class Gained:
    """The nodes of one gain on inputs."""

    gain: fx.Node
    more: fx.Node
    """P(x ⊙ (g − 1))."""
    base: fx.Node
    """P(x)."""
    given: fx.Node
    """Its x."""
    sum: fx.Node


def gained(gain: fx.Node) -> Gained:
    """The sum an `input_gain` node ends in; raises `NotFoldable` where it does not."""
    more, passed = _only_product(gain)
    (last,) = [more, *passed][-1:]
    (total,) = last.users if len(last.users) == 1 else (None,)
    if total is None or total.target is not aten.add.Tensor or total.args[1] is not last or total.kwargs:
        raise NotFoldable("its product is not added to another one")
    base, reshaped = through_reshapes(total.args[0])
    if not isinstance(base, fx.Node) or base.target not in _INPUT:
        what = base.target if isinstance(base, fx.Node) else base
        raise NotFoldable(f"its base output comes from {what}, not from a product with one weight")
    if any(len(each.users) != 1 for each in (base, *reshaped)):
        raise NotFoldable("the base output is used a second time, without the adapter")
    given: Any = base.args[_INPUT[base.target]]
    if through_reshapes(given)[0] is not through_reshapes(gain.args[0])[0]:
        raise NotFoldable("it reads another input than its base does")
    return Gained(gain, more, base, given, total)


def _only_product(gain: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """The product that alone reads a gain's result, and the changes of shape after it."""
    node, passed = gain, []
    product: fx.Node | None = None
    while len(node.users) == 1:
        (user,) = node.users
        if product is None and user.target in _INPUT and user.args[_INPUT[user.target]] is node:
            product = user
        elif through_reshapes(user)[0] is user:
            break
        elif product is not None:
            passed.append(user)
        node = user
    if product is None:
        raise NotFoldable("its result is not the input of one product")
    return product, passed
