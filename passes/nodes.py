"""The dialect's nodes in a captured program: which they are, whose they are, and how to make new ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.export import ExportedProgram

from lrcompile import dialect as dialect  # these register torch.ops.lrcompile
from lrcompile.dialect import experts as experts
from lrcompile.dialect import gain as gain
from lrcompile.dialect import galore as galore
from lrcompile.dialect import hadamard as hadamard
from lrcompile.dialect import integers as integers
from lrcompile.dialect import nf4 as nf4
from lrcompile.dialect import norm as norm
from lrcompile.kernels.nf4_dequant import Nf4
from lrcompile.passes.tensors import Tensors

LORA = torch.ops.lrcompile.lora.default
LOOKUP = torch.ops.lrcompile.lora_embedding.default
EXPERTS = torch.ops.lrcompile.lora_experts.default
PROJECT = torch.ops.lrcompile.project_gradient.default
HADAMARD = torch.ops.lrcompile.hadamard.default
ADAPTERS = (LORA, LOOKUP, EXPERTS, HADAMARD)
"""Ops of the form op(y, x, A, B, scale, …) that add to y what is linear in A, B and scale."""
GAIN = torch.ops.lrcompile.gain.default
INPUT_GAIN = torch.ops.lrcompile.input_gain.default
GAINS = (GAIN, INPUT_GAIN)
"""Ops of the form op(value, g, …) that do nothing where g is one."""
NF4_LINEAR = torch.ops.lrcompile.nf4_linear.default
INTEGER_LINEAR = torch.ops.lrcompile.integer_linear.default
STEP_CONSTANTS = (torch.ops.lrcompile.dora_norm.default, torch.ops.lrcompile.nf4_dora_norm.default)
"""Ops on weights alone whose results are constants to autograd: they change only when a weight does."""


def adapted_sites(program: ExportedProgram) -> list[str]:
    """The sites whose adapters are nodes of the program, in order."""
    tensors = Tensors(program)
    found = [node for node in program.graph.nodes if node.target in ADAPTERS + GAINS]
    return list(dict.fromkeys(site_of(node, tensors) for node in found))


def nf4_sites(program: ExportedProgram) -> list[str]:
    """The linear maps of the program whose weight is stored as NF4."""
    tensors = Tensors(program)
    found = [tensors.targets[node.args[1].name] for node in program.graph.nodes if node.target is NF4_LINEAR]
    return list(dict.fromkeys(name.removesuffix("weight_codes").rstrip(".") for name in found))


def integer_sites(program: ExportedProgram) -> list[str]:
    """The linear maps of the program whose weight is stored as integers."""
    tensors = Tensors(program)
    found = [tensors.targets[node.args[1].name] for node in program.graph.nodes if node.target is INTEGER_LINEAR]
    return list(dict.fromkeys(name.removesuffix("weight_integers").rstrip(".") for name in found))


def held_nf4(tensors: Tensors, nodes: Sequence[Any]) -> Nf4:
    """The storage behind the four arguments of an `nf4_linear` that name it."""
    codes, absmax, *double = nodes
    scale, offset = (None if each is None else tensors.get(each) for each in double)
    return Nf4(tensors.get(codes), tensors.get(absmax), scale, offset)


def site_of(node: fx.Node, tensors: Tensors) -> str:
    """The site an adapter node belongs to: where its factors live, or else the name of the node."""
    own = node.args[1 if node.target in GAINS else 2]
    name = _module_of(node) or adapter_target(own, tensors) or node.name
    host, mark, rest = name.partition("lrcompile_adapters.")
    slot = rest.split(".")[0]
    return (host + ("" if slot == "weight" else slot)).rstrip(".") if mark else name.removesuffix(".A")


def _module_of(node: fx.Node) -> str | None:
    """The adapter whose forward made this node: sites may share factors, never that."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next((path for path, _ in reversed(list(stack.values())) if "lrcompile_adapters." in path), None)
    return None if path is None else f"{path}.A"


def adapter_target(factor: Any, tensors: Tensors) -> str | None:
    """The name of a held tensor that a factor is, or is computed from: one of the adapter's own, if there is any."""
    if not isinstance(factor, fx.Node):
        return None
    if factor.op != "call_function":
        return tensors.target(factor)
    found = [name for each in factor.all_input_nodes if (name := adapter_target(each, tensors)) is not None]
    return next((name for name in found if "lrcompile_adapters." in name), found[0] if found else None)


def call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    """A new node at the graph's insertion point, with the fake value of its result."""
    node = graph.call_function(target, args)
    with enable_python_dispatcher():  # torch 2.11's own matmul does not take sizes that vary
        node.meta = {"val": target(*(each.meta["val"] if isinstance(each, fx.Node) else each for each in args))}
    return node


def tidy(program: ExportedProgram) -> None:
    """Drop what nothing uses any more, check the graph, and make its code anew."""
    _drop_checks_of_constants(program)
    program.graph.eliminate_dead_code()
    program.graph.lint()
    program.graph_module.recompile()


def _drop_checks_of_constants(program: ExportedProgram) -> None:
    """Capture asserts the dtype of everything that is cast; of what held tensors alone decide that is known, and the
    assertion would keep what it looks at in the program.
    """
    held = Tensors(program).targets
    constant: set[fx.Node] = set()
    for node in list(program.graph.nodes):
        inputs = node.all_input_nodes
        if node.name in held or (node.op == "call_function" and inputs and constant.issuperset(inputs)):
            constant.add(node)
            if node.target is torch.ops.aten._assert_tensor_metadata.default:
                program.graph.erase_node(node)
