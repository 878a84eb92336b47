"""A node replaced by the plain operations it stands for, traced on its own shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx

from lrcompile.passes.tensors import substitute


def inline(
    program: ExportedProgram,
    node: fx.Node,
    args: list[Any],
    plain: Callable[..., torch.Tensor],
    *,
    composite: bool = False,
) -> None:
    """Put the operations of `plain(*args)` in the place of `node`; `args` are nodes and constants. `composite`: they
    stay what `plain` calls (linear, reshape), instead of what these are on the strides known now.
    """
    given = [arg for arg in args if isinstance(arg, fx.Node)]

    def called(*values: torch.Tensor) -> torch.Tensor:
        left = iter(values)
        filled: list[Any] = [next(left) if isinstance(arg, fx.Node) else arg for arg in args]
        return plain(*filled)

    mode = node.meta["val"].fake_mode
    with mode:
        body = make_fx(called, pre_dispatch=composite)(*(arg.meta["val"] for arg in given))
    mapped: dict[fx.Node, Any] = dict(zip(body.graph.find_nodes(op="placeholder"), given, strict=True))
    with node.graph.inserting_before(node):
        for each in body.graph.nodes:
            if each.op == "call_function":
                mapped[each] = node.graph.node_copy(each, lambda n: mapped[n])
    (result,) = body.graph.output_node().args
    substitute(program, node, mapped[result])  # type: ignore[index]
