"""fold-scale: s·(xAᵀ)Bᵀ = (xAᵀ)(s·B)ᵀ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from lrcompile.passes.base import Equivalence, Pass, Program, Refusal, Result
from lrcompile.passes.nodes import ADAPTERS, tidy
from lrcompile.passes.tensors import Tensors


@dataclass(frozen=True)
class FoldScale(Pass[Program]):
    """s·(xAᵀ)Bᵀ = (xAᵀ)(s·B)ᵀ: one product of size T×rank less for each adapter, and a scale of one.

    s·B is a new tensor, `<B>_scaled`, one for each B and scale: calls of one layer, and q, k and v that take slices of
    one B, share it. Refuses where B or the scale is computed, since there is nothing to write the product to, and
    where the product leaves the range of the dtype it is used in.
    """

    name: ClassVar[str] = "fold-scale"
    preserves: ClassVar[Equivalence] = "reassociation"

    def apply(self, program: Program) -> Result:
        tensors, count, refusals = Tensors(program.exported), 0, []
        made: dict[tuple[fx.Node, float], fx.Node] = {}
        ones: dict[torch.dtype, fx.Node] = {}
        first = next(node for node in program.exported.graph.nodes if node.op == "placeholder")
        for node in [n for n in program.exported.graph.nodes if n.target in ADAPTERS]:
            view, scale = tensors.view(node.args[3]), tensors.value(node.args[4])
            if view is None or scale is None:
                refusals.append(Refusal(node.name, "its B or its scale is computed, not held"))
                continue
            if float(scale) == 1.0:
                continue
            key, dtype = (view.source, float(scale)), node.meta["val"].dtype
            if key not in made:
                scaled = _scaled(tensors.get(view.source), scale, dtype)
                if scaled is None:
                    refusals.append(Refusal(node.name, f"{float(scale):g}·B leaves the range of {dtype}"))
                    continue
                made[key] = tensors.add(f"{tensors.targets[view.source.name]}_scaled", scaled, first)
            if scale.dtype not in ones:
                ones[scale.dtype] = tensors.add("lrcompile_one", torch.ones_like(scale), first)
            with program.exported.graph.inserting_before(node):
                node.args = (*node.args[:3], view.rebuilt(made[key]), ones[scale.dtype], *node.args[5:])
            count += 1
        if count:
            tidy(program.exported)
        return Result(count, tuple(refusals))


def _scaled(B: Tensor, scale: Tensor, used: torch.dtype) -> Tensor | None:
    """s·B, held no narrower than it is `used`; None where a value of it would overflow there, or lose bits as a
    subnormal.
    """
    wide = torch.promote_types(torch.promote_types(B.dtype, used), torch.float32)
    product = B.to(wide) * scale.to(wide)
    rounding = (product.to(used).to(wide) - product).abs()
    if (rounding > torch.finfo(used).eps * product.abs()).any():
        return None
    return product.to(torch.promote_types(B.dtype, used))
