"""expand-slots: lora(y, x, A, B, s) = y + (x·Aᵀ)·(s·Bᵀ), with Aᵀ and s·Bᵀ held the way ONNX Runtime's adapters are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from lrcompile.passes.base import Equivalence, Pass, Program, Refusal, Result
from lrcompile.passes.nodes import EXPERTS, GAIN, HADAMARD, INPUT_GAIN, LOOKUP, LORA, call, site_of, tidy
from lrcompile.passes.tensors import Tensors, substitute

aten = torch.ops.aten

INPUTS = {"A": "lora_A.weight", "B": "lora_B.weight"}
"""What the factors of a site are called in the program; gains keep their names."""


@dataclass(frozen=True)
class ExpandSlots(Pass[Program]):
    """lora(y, x, A, B, s) = y + (x·Aᵀ)·(s·Bᵀ): `<site>.lora_A.weight` `[in, rank]`, `<site>.lora_B.weight` `[rank, out]`.

    That is the form of ONNX Runtime's adapters, and nothing the graph then says depends on the rank. Lookups read rows
    of Aᵀ, experts each row's own pair. gain(y, g, c) = y + (g − 1) ⊙ (y − c) with `<site>.<name of g>` held, and the g
    of an input gain takes such a name too. Refuses active dropout and operands that are computed, not held.
    """

    name: ClassVar[str] = "expand-slots"
    preserves: ClassVar[Equivalence] = "reassociation"

    def apply(self, program: Program) -> Result:
        names, count, refusals = _Names(program), 0, []
        for node in list(program.exported.graph.nodes):
            build = _BUILD.get(node.target)
            if build is None:
                continue
            try:
                with program.exported.graph.inserting_before(node):
                    result = build(node, names)
            except _Left as reason:
                refusals.append(Refusal(site_of(node, names.tensors), str(reason)))
                continue
            if result is None:
                continue
            if result is not node:
                result.meta = {**node.meta}
                substitute(program.exported, node, result)
            count += 1
        if count:
            tidy(program.exported)
        return Result(count, tuple(refusals))


class _Left(Exception):
    """Why a node stays."""


class _Names:
    """The operands of adapter nodes as tensors of their site, made once each."""

    def __init__(self, program: Program):
        self.tensors = Tensors(program.exported)
        self.made: dict[tuple[Any, ...], fx.Node] = {}
        self.first = next(node for node in program.exported.graph.nodes if node.op == "placeholder")

    def turned(self, node: fx.Node, index: int, letter: str, scale: float, dtype: torch.dtype) -> fx.Node:
        """The transpose of a factor, times `scale`; of a part of one, the transpose of the same part."""
        view = self.tensors.view(node.args[index])
        if view is None:
            raise _Left("its factors are computed, not held")
        source = self._held(view.source, INPUTS[letter], lambda held: (held.to(dtype) * scale).mT, scale, dtype)
        if not view.steps:
            return source
        back = call(node.graph, aten.transpose.int, source, -2, -1)
        return call(node.graph, aten.transpose.int, view.rebuilt(back), -2, -1)

    def gain(self, node: fx.Node) -> fx.Node:
        g = node.args[1]
        if self.tensors.target(g) is None:
            raise _Left("its gain is computed, not held")
        assert isinstance(g, fx.Node)
        return self._held(g, self.tensors.targets[g.name].rpartition(".")[2], lambda held: held)

    def _held(self, source: fx.Node, name: str, change: Any, *key: Any) -> fx.Node:
        if (source, *key) not in self.made:
            value: Tensor = change(self.tensors.get(source))
            named = f"{_site(self.tensors.targets[source.name])}.{name}".lstrip(".")
            self.made[(source, *key)] = self.tensors.add(named, value.contiguous(), self.first)
        return self.made[(source, *key)]


def _site(target: str) -> str:
    """Whose the held tensor `target` is; sites may share no tensor here, so its name tells."""
    host, mark, rest = target.partition("lrcompile_adapters.")
    slot = rest.partition(".")[0]
    return (host + ("" if slot == "weight" else slot)).rstrip(".") if mark else target.rpartition(".")[0]


def _pair(node: fx.Node, names: _Names) -> tuple[fx.Node, fx.Node]:
    scale = names.tensors.value(node.args[4])
    if scale is None:
        raise _Left("its scale is computed, not held")
    dtype = _dtype(node.args[0])
    return names.turned(node, 2, "A", 1.0, dtype), names.turned(node, 3, "B", float(scale), dtype)


def _lora(node: fx.Node, names: _Names) -> fx.Node:
    if len(node.args) > 5 and node.args[5]:
        raise _Left("its dropout is active")
    y, x = node.args[:2]
    A, B = _pair(node, names)
    graph = node.graph
    code = call(graph, aten.matmul.default, _cast(x, _dtype(y)), A)
    return call(graph, aten.add.Tensor, y, call(graph, aten.matmul.default, code, B))


def _lookup(node: fx.Node, names: _Names) -> fx.Node:
    y, ids = node.args[:2]
    A, B = _pair(node, names)
    code = call(node.graph, aten.embedding.default, A, ids)
    return call(node.graph, aten.add.Tensor, y, call(node.graph, aten.matmul.default, code, B))


def _experts(node: fx.Node, names: _Names) -> fx.Node:
    """Each row's own pair is gathered, as a captured mixture gathers each row's own weight."""
    y, x, _, _, _, experts, *rest = node.args
    if rest and rest[0]:
        raise _Left("its dropout is active")
    if experts.meta["val"].dim() != 1:  # type: ignore[union-attr]
        raise _Left("its rows are not one list")
    A, B = _pair(node, names)
    graph, count = node.graph, A.meta["val"].shape[0]
    known = call(graph, aten.clamp.default, experts, 0, count - 1)  # an index of `count` means no expert
    own_A, own_B = (call(graph, aten.index_select.default, each, 0, known) for each in (A, B))
    code = call(graph, aten.matmul.default, call(graph, aten.unsqueeze.default, _cast(x, _dtype(y)), -2), own_A)
    more = call(graph, aten.squeeze.dim, call(graph, aten.matmul.default, code, own_B), -2)
    absent = call(graph, aten.unsqueeze.default, call(graph, aten.ge.Scalar, experts, count), -1)
    return call(graph, aten.add.Tensor, y, call(graph, aten.masked_fill.Scalar, more, absent, 0.0))


def _gain(node: fx.Node, names: _Names) -> fx.Node:
    y, _, kept = (*node.args, None)[:3]
    graph, g, dtype = node.graph, names.gain(node), _dtype(y)
    less = _cast(call(graph, aten.sub.Tensor, g, 1.0), dtype)
    moved = y if kept is None else call(graph, aten.sub.Tensor, y, _cast(kept, dtype))
    return call(graph, aten.add.Tensor, y, call(graph, aten.mul.Tensor, less, moved))


def _input_gain(node: fx.Node, names: _Names) -> fx.Node | None:
    if "lrcompile_adapters." not in (names.tensors.target(node.args[1]) or "lrcompile_adapters."):
        return None  # it has its name
    node.update_arg(1, names.gain(node))
    return node


def _refuse(node: fx.Node, names: _Names) -> fx.Node:
    raise _Left("its update is as large as the weight")


_BUILD = {
    LORA: _lora,
    LOOKUP: _lookup,
    EXPERTS: _experts,
    GAIN: _gain,
    INPUT_GAIN: _input_gain,
    HADAMARD: _refuse,
}


def _dtype(node: Any) -> torch.dtype:
    return node.meta["val"].dtype


def _cast(node: Any, dtype: torch.dtype) -> fx.Node:
    return node if _dtype(node) == dtype else call(node.graph, aten.to.dtype, node, dtype)
