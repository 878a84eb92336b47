"""fold-scale: s·(xAᵀ)Bᵀ = (xAᵀ)(s·B)ᵀ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from lrcompile.passes.base import Equivalence, Pass, Program, Refusal, Result
from lrcompile.passes.nodes import ADAPTERS, tidy
from lrcompile.passes.tensors import Tensors


@dataclass(frozen=True)
class FoldScale(Pass):
    """s·(xAᵀ)Bᵀ = (xAᵀ)(s·B)ᵀ: one product of size T×rank less for each adapter, and a scale of one.

    Refuses an adapter whose B or scale is computed, since there is nothing to write the product to.
    """

    name: ClassVar[str] = "fold-scale"
    preserves: ClassVar[Equivalence] = "reassociation"

    def apply(self, program: Program) -> Result:
        tensors, count, refusals = Tensors(program.exported), 0, []
        for node in [n for n in program.exported.graph.nodes if n.target in ADAPTERS]:
            B, scale = tensors.value(node.args[3]), tensors.value(node.args[4])
            if B is None or scale is None:
                refusals.append(Refusal(node.name, "its B or its scale depends on an input"))
            elif float(scale) != 1.0:
                self._fold(node, tensors, B, scale)
                count += 1
        if count:
            tidy(program.exported)
        return Result(count, tuple(refusals))

    @staticmethod
    def _fold(node: fx.Node, tensors: Tensors, B: torch.Tensor, scale: torch.Tensor) -> None:
        """New tensors, since q, k and v may share one B with slices taken, and every use of it has its own scale."""
        first = next(n for n in node.graph.nodes if n.op == "placeholder")
        wide = torch.promote_types(B.dtype, torch.float32)
        scaled = tensors.add(f"{node.name}_scaled_B", (B.to(wide) * scale.to(wide)).to(B.dtype), first)
        one = tensors.add(f"{node.name}_one", torch.ones_like(scale), first)
        node.args = (*node.args[:3], scaled, one, *node.args[5:])
