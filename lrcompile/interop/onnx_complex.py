"""A new axis of complex values, as rotary embeddings in polar form need one (Llama 4): unsqueeze(z, d) on the pairs.

torch's translations hold z as real pairs `[..., 2]` and have a form of most operations on it, but not of this one.
"""

from __future__ import annotations

import torch
from torch.export import ExportedProgram

from lrcompile.passes.nodes import call, tidy
from lrcompile.passes.tensors import substitute

aten = torch.ops.aten


def unsqueeze_pairs(program: ExportedProgram) -> int:
    """unsqueeze(z, d) = complex(unsqueeze(pairs(z), d)); returns how many there were."""
    found = [
        node for node in program.graph.nodes if node.target is aten.unsqueeze.default and node.meta["val"].is_complex()
    ]
    for node in found:
        value, axis = node.args
        with program.graph.inserting_before(node):
            pairs = call(program.graph, aten.view_as_real.default, value)
            longer = call(program.graph, aten.unsqueeze.default, pairs, axis % node.meta["val"].dim())
            result = call(program.graph, aten.view_as_complex.default, longer)
        result.meta = {**node.meta}
        substitute(program, node, result)
    if found:
        tidy(program)
    return len(found)
