"""expand-slots: lora(y, x, A, B, s) = y + (x·Aᵀ)·(s·Bᵀ), with Aᵀ and s·Bᵀ held the way ONNX Runtime's adapters are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from lrcompile.passes.base import Equivalence, Pass, Program, Refusal, Result
from lrcompile.passes.nodes import EXPERTS, GAIN, HADAMARD, LOOKUP, LORA, call, site_of, tidy
from lrcompile.passes.tensors import Tensors, substitute

aten = torch.ops.aten

TURNED = {"A": "lora_A", "B": "lora_B"}
"""What the turned factors are called, beside those they are made of."""


@dataclass(frozen=True)
class ExpandSlots(Pass[Program]):
    """lora(y, x, A, B, s) = y + (x·Aᵀ)·(s·Bᵀ): Aᵀ `[in, rank]` is held as `lora_A`, s·Bᵀ `[rank, out]` as `lora_B`.

    That is the form of ONNX Runtime's adapters, and nothing the graph then says depends on the rank. Lookups read rows
    of Aᵀ, experts each row's own pair. gain(y, g, c) = y ⊙ g + c ⊙ (1 − g), in 16 bits
    y + (g − 1) ⊙ (y − c). Refuses active dropout and operands that are computed, not held.
    """

    name: ClassVar[str] = "expand-slots"
    preserves: ClassVar[Equivalence] = "reassociation"

    def apply(self, program: Program) -> Result:
        factors, count, refusals = _Factors(program), 0, []
        for node in list(program.exported.graph.nodes):
            build = _BUILD.get(node.target)
            if build is None:
                continue
            try:
                with program.exported.graph.inserting_before(node):
                    result = build(node, factors)
            except _Left as reason:
                refusals.append(Refusal(site_of(node, factors.tensors), str(reason)))
                continue
            result.meta = {**node.meta}
            substitute(program.exported, node, result)
            count += 1
        if count:
            tidy(program.exported)
        return Result(count, tuple(refusals))


class _Left(Exception):
    """Why a node stays."""


class _Factors:
    """The factors of adapter nodes the other way round, each made once."""

    def __init__(self, program: Program):
        self.tensors = Tensors(program.exported)
        self.made: dict[tuple[Any, ...], fx.Node] = {}
        self.first = next(node for node in program.exported.graph.nodes if node.op == "placeholder")

    def pair(self, node: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Aᵀ and s·Bᵀ in the dtype of y; of a part of a factor, the same part."""
        views, scale = [self.tensors.view(factor) for factor in node.args[2:4]], self.tensors.value(node.args[4])
        if scale is None or any(view is None for view in views):
            raise _Left("its factors or its scale are computed, not held")
        A, B = (
            self._part(node, view, letter, by, _dtype(node.args[0]))
            for view, letter, by in zip(views, "AB", (1.0, float(scale)), strict=True)
        )
        return A, B

    def _part(self, node: fx.Node, view: Any, letter: str, scale: float, dtype: torch.dtype) -> fx.Node:
        source = self._turned(view.source, letter, scale, dtype)
        if not view.steps:
            return source
        back = call(node.graph, aten.transpose.int, source, -2, -1)
        return call(node.graph, aten.transpose.int, view.rebuilt(back), -2, -1)

    def _turned(self, source: fx.Node, letter: str, scale: float, dtype: torch.dtype) -> fx.Node:
        key = (source, letter, scale, dtype)
        if key not in self.made:
            beside = self.tensors.targets[source.name].rpartition(".")[0]
            value = (self.tensors.get(source).to(dtype) * scale).mT.contiguous()
            self.made[key] = self.tensors.add(f"{beside}.{TURNED[letter]}".lstrip("."), value, self.first)
        return self.made[key]


def _lora(node: fx.Node, factors: _Factors) -> fx.Node:
    if len(node.args) > 5 and node.args[5]:
        raise _Left("its dropout is active")
    y, x = node.args[:2]
    A, B = factors.pair(node)
    graph = node.graph
    code = call(graph, aten.matmul.default, _cast(x, _dtype(y)), A)
    return call(graph, aten.add.Tensor, y, call(graph, aten.matmul.default, code, B))


def _lookup(node: fx.Node, factors: _Factors) -> fx.Node:
    y, ids = node.args[:2]
    A, B = factors.pair(node)
    code = call(node.graph, aten.embedding.default, A, ids)
    return call(node.graph, aten.add.Tensor, y, call(node.graph, aten.matmul.default, code, B))


def _experts(node: fx.Node, factors: _Factors) -> fx.Node:
    """Each row's own pair is gathered, as a captured mixture gathers each row's own weight."""
    y, x, _, _, _, experts, *rest = node.args
    if rest and rest[0]:
        raise _Left("its dropout is active")
    if experts.meta["val"].dim() != 1:  # type: ignore[union-attr]
        raise _Left("its rows are not one list")
    A, B = factors.pair(node)
    graph, count = node.graph, A.meta["val"].shape[0]
    known = call(graph, aten.clamp.default, experts, 0, count - 1)  # an index of `count` means no expert
    own_A, own_B = (call(graph, aten.index_select.default, each, 0, known) for each in (A, B))
    code = call(graph, aten.matmul.default, call(graph, aten.unsqueeze.default, _cast(x, _dtype(y)), -2), own_A)
    more = call(graph, aten.squeeze.dim, call(graph, aten.matmul.default, code, own_B), -2)
    absent = call(graph, aten.unsqueeze.default, call(graph, aten.ge.Scalar, experts, count), -1)
    return call(graph, aten.add.Tensor, y, call(graph, aten.masked_fill.Scalar, more, absent, 0.0))


def _gain(node: fx.Node, factors: _Factors) -> fx.Node:
    y, _, kept = (*node.args, None)[:3]
    if factors.tensors.target(node.args[1]) is None:
        raise _Left("its gain is computed, not held")
    graph, dtype, g = node.graph, _dtype(y), node.args[1]
    if dtype.itemsize < 4:  # g near one would round to it
        less = _cast(call(graph, aten.sub.Tensor, g, 1.0), dtype)
        moved = y if kept is None else call(graph, aten.sub.Tensor, y, _cast(kept, dtype))
        return call(graph, aten.add.Tensor, y, call(graph, aten.mul.Tensor, less, moved))
    scaled = call(graph, aten.mul.Tensor, y, _cast(g, dtype))
    if kept is None:
        return scaled
    rest = call(graph, aten.mul.Tensor, _cast(kept, dtype), call(graph, aten.rsub.Scalar, _cast(g, dtype), 1.0))
    return call(graph, aten.add.Tensor, scaled, rest)


def _refuse(node: fx.Node, factors: _Factors) -> fx.Node:
    raise _Left("its update is as large as the weight")


_BUILD = {
    LORA: _lora,
    LOOKUP: _lookup,
    EXPERTS: _experts,
    GAIN: _gain,
    HADAMARD: _refuse,
}


def _dtype(node: Any) -> torch.dtype:
    return node.meta["val"].dtype


def _cast(node: Any, dtype: torch.dtype) -> fx.Node:
    return node if _dtype(node) == dtype else call(node.graph, aten.to.dtype, node, dtype)
