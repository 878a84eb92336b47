"""dequantize-nf4: x·(c[q]·m)ᵀ = xWᵀ with W = round(c[q]·m), where an adapter waits to be folded into W."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import fx

from lrcompile.errors import SpecError
from lrcompile.kernels.nf4_dequant import Nf4, dequantize_nf4
from lrcompile.passes.base import Equivalence, Pass, Pending, Program, Result
from lrcompile.passes.folding import NotFoldable
from lrcompile.passes.input_gains import gained
from lrcompile.passes.nodes import GAIN, HADAMARD, INPUT_GAIN, LORA, NF4_LINEAR, call, tidy
from lrcompile.passes.tensors import Tensors, substitute

aten = torch.ops.aten
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class DequantizeNf4(Pass[Program]):
    """x·(c[q]·m)ᵀ = xWᵀ for every NF4 linear map that an adapter adds to; W is pending, written in `into`.

    Folding into codes would round a small update away; into a float weight it costs one rounding to `into`.
    """

    name: ClassVar[str] = "dequantize-nf4"
    preserves: ClassVar[Equivalence] = "cast"
    into: str = "float32"

    def __post_init__(self) -> None:
        if self.into not in DTYPES:
            message = f"into={self.into!r} is not valid: choose one of {', '.join(map(repr, DTYPES))}"
            raise SpecError(message, field="into")

    def apply(self, program: Program) -> Result:
        graph, tensors = program.exported.graph, Tensors(program.exported)
        found = _adapted(graph)
        weights: dict[fx.Node, fx.Node] = {}  # by codes: a layer called twice keeps one weight
        for node in found:
            codes: Any = node.args[1]
            if codes not in weights:
                weights[codes] = self._weight(program, tensors, node)
            self._spell_out(program, node, weights[codes])
        if found:
            tidy(program.exported)
        return Result(len(found))

    def _weight(self, program: Program, tensors: Tensors, node: fx.Node) -> fx.Node:
        given: tuple[Any, ...] = node.args
        _, codes, absmax, scale, offset, _, out_features, in_features, block_size, transposed, _ = given
        second = (None, None) if scale is None else (tensors.get(scale), tensors.get(offset))
        nf4 = Nf4(tensors.get(codes), tensors.get(absmax), *second)
        shape = torch.Size((in_features, out_features) if transposed else (out_features, in_features))
        dtype = DTYPES[self.into]
        # the program needs a tensor of this shape and dtype to refer to; one element, expanded, costs no memory
        stand_in = torch.empty(1, dtype=dtype).expand(shape)
        weight = tensors.add(tensors.targets[codes.name].removesuffix("_codes"), stand_in, codes)
        value = partial(dequantize_nf4, nf4, tuple(shape), block_size)
        program.pending[tensors.targets[weight.name]] = Pending(value, dtype, shape)
        return weight

    @staticmethod
    def _spell_out(program: Program, node: fx.Node, weight: fx.Node) -> None:
        given: tuple[Any, ...] = node.args
        x, bias, transposed = given[0], given[5], given[9]
        graph, activations = program.exported.graph, node.meta["val"].dtype

        def cast(tensor: fx.Node) -> fx.Node:  # held in one dtype, read in the activations'
            same = tensor.meta["val"].dtype == activations
            return tensor if same else call(graph, aten.to.dtype, tensor, activations)

        with graph.inserting_before(node):
            read = cast(call(graph, aten.t.default, weight) if transposed else weight)
            linear = graph.call_function(aten.linear.default, (x, read, None if bias is None else cast(bias)))
        linear.meta = dict(node.meta)
        substitute(program.exported, node, linear)


def _adapted(graph: fx.Graph) -> list[fx.Node]:
    """The NF4 maps that an adapter adds to, scales, or has a second product with."""
    found = {n: None for n in graph.nodes if n.target is NF4_LINEAR and any(u.target in _ADAPTERS for u in n.users)}
    for gain in [node for node in graph.nodes if node.target is INPUT_GAIN]:
        with suppress(NotFoldable):  # left as it is, for the merge to say why
            both = gained(gain)
            found |= {each: None for each in (both.base, both.more) if each.target is NF4_LINEAR}
    return list(found)


_ADAPTERS = (LORA, GAIN, HADAMARD)
