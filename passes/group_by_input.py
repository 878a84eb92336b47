"""group-by-input: [x·W₁ᵀ + s₁(x·A₁ᵀ)B₁ᵀ, …] = x·[W₁; …]ᵀ + diag(s₁B₁, …)·(x·[A₁; …]ᵀ)."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from lrcompile.lowered.dropout import ReplayedLora
from lrcompile.lowered.group import AdaptedGroup
from lrcompile.lowered.members import Member, Role
from lrcompile.lowered.operands import Operands
from lrcompile.passes.base import Equivalence, Pass, Refusal, Result, Stage
from lrcompile.passes.captured import Linear, Places, calls, drop_dead, dropout_of, linear_at, same, trains, value
from lrcompile.passes.factored import Factor, factor_at
from lrcompile.passes.nodes import LORA, PROJECT


@dataclass(frozen=True)
class GroupByInput(Pass[fx.GraphModule]):
    """[x·W₁ᵀ + s₁(x·A₁ᵀ)B₁ᵀ, …] = x·[W₁; …]ᵀ + diag(s₁B₁, …)·(x·[A₁; …]ᵀ): maps of one input become one node.

    The node is a `lowered.AdaptedGroup`: one product for all codes, the expand in the base's own buffer, one gradient
    of x; a single map is a group of one. Methods may differ, ranks and widths too; equal A (VeRA's) are read once,
    factors between diagonals (VeRA's B, AdaLoRA's A) are formed in it.
    Refuses where another node sees y in between, the weight trains or is computed, the input is another one, tensors or
    modes may change in between, the scale trains, or dropout is active that `replay-dropout` has not taken. Leaves
    everything else of the dialect to autograd: rows of embeddings and stacks of maps (attention's, experts') have no
    product with one matrix to be added to, element-wise products and gains on inputs change the map itself.
    """

    name: ClassVar[str] = "group-by-input"
    stage: ClassVar[Stage] = "dynamo"
    preserves: ClassVar[Equivalence] = "reassociation"

    def apply(self, subject: fx.GraphModule) -> Result:
        graph, refusals, found = subject.graph, [], []
        places = Places(graph)
        for node in graph.nodes:
            if calls(node, LORA, PROJECT) or isinstance(node.target, ReplayedLora):
                site = _site(node, places)
                if isinstance(site, _Site):
                    found.append(site)
                else:
                    refusals.append(Refusal(node.name, site))
        groups = _grouped(places, found)
        ahead = [places.ahead(_operands(group), group[0].node) for group in groups]
        for group, nodes in reversed(list(zip(groups, ahead, strict=True))):  # a node two need goes to the earlier one
            for node in nodes:
                group[0].node.prepend(node)
            _lower(graph, group)
        if groups:
            drop_dead(graph)
            graph.lint()
            subject.recompile()
        return Result(len(groups), tuple(refusals))


@dataclass(frozen=True)
class _Site:
    node: fx.Node
    linear: Linear
    role: Role
    A: Factor
    B: Factor
    scale: fx.Node | None
    p: float = 0.0
    seed: fx.Node | None = None


def _site(node: fx.Node, places: Places) -> _Site | str:
    y = node.args[0]
    linear = linear_at(y)
    if linear is None:
        return "its base is no linear map with a frozen weight"
    if len(y.users) != 1:  # type: ignore[union-attr]
        return "another node sees the base's output"
    if node.args[1] is not linear.x:
        return "the adapter and the base have different inputs"
    if places.written(linear.nodes[0], node):
        return "tensors or modes may change between the base and the adapter"
    if calls(node, PROJECT):
        _, _, Z, P, right = node.args
        if right:
            return _Site(node, linear, "right", Factor(P), Factor(Z), None)  # type: ignore[arg-type]
        return _Site(node, linear, "left", Factor(Z), Factor(P), None)  # type: ignore[arg-type]
    p, seed = (node.target.p, node.args[5]) if isinstance(node.target, ReplayedLora) else (0.0, None)
    A, B, scale = node.args[2:5]
    if seed is None and (active := dropout_of(node)):
        return f"dropout {active} is active"
    if value(A).dim() != 2:
        return "its factors are a stack"
    if trains(scale):  # type: ignore[arg-type]
        return "its scale trains"
    first, second = (factor_at(each, node, places) for each in (A, B))  # type: ignore[arg-type]
    return _Site(node, linear, "pair", first, second, scale, p, seed)  # type: ignore[arg-type]


def _grouped(places: Places, sites: Sequence[_Site]) -> list[list[_Site]]:
    """Sites of one input, as far as all can be computed where the first is."""
    by_input: dict[fx.Node, list[list[_Site]]] = {}
    nodes = {site.node for site in sites}
    for site in sites:
        groups = by_input.setdefault(site.linear.x, [])
        for group in groups:
            anchor = group[0].node
            if not places.written(anchor, site.node) and nodes.isdisjoint(places.ahead(_operands([site]), anchor)):
                group.append(site)
                break
        else:
            groups.append([site])
    return sorted((group for groups in by_input.values() for group in groups), key=lambda each: places[each[0].node])


def _operands(sites: Sequence[_Site]) -> list[fx.Node]:
    found = [
        (*each.linear.held, each.linear.bias, *each.A.nodes(), *each.B.nodes(), each.scale, each.seed) for each in sites
    ]
    return [node for operands in found for node in operands if node is not None]


def _lower(graph: fx.Graph, group: Sequence[_Site]) -> None:
    codes: list[_Site] = []
    for site in group:
        if _code_of(site, codes) is None:
            codes.append(site)
    members = tuple(Member(each.linear.base, _index(each, codes), each.role) for each in group)
    lowered = AdaptedGroup(members, tuple(each.p for each in codes))
    factors = [*(each.A for each in codes), *(each.B for each in group)]
    operands = Operands(
        [list(each.linear.held) for each in group],
        [each.linear.bias for each in group],
        [each.B.matrix for each in group],
        [each.scale for each in group],
        [each.A.matrix for each in codes],
        [each.seed for each in codes],
        [each.rows for each in factors],
        [each.columns for each in factors],
    )
    outputs: tuple[Any, ...] = tuple(value(each.node) for each in group)
    with graph.inserting_before(group[0].node):
        node = graph.call_function(lowered, (group[0].linear.x, *operands.flat()))
        node.meta = {"example_value": outputs}
        for index, each in enumerate(group):
            result = graph.call_function(operator.getitem, (node, index))
            result.meta = {**each.node.meta}
            each.node.replace_all_uses_with(result)
    for each in group:
        graph.erase_node(each.node)
        for dead in reversed(each.linear.nodes):
            graph.erase_node(dead)


def _code_of(site: _Site, codes: Sequence[_Site]) -> int | None:
    """Which code `site` reads, or can share: one of the same A, if what it adds to the gradient of A may be summed."""

    def shared(other: _Site) -> bool:
        return other.role == site.role != "left" and not (other.p or site.p) and _same(other.A, site.A)

    return next((index for index, other in enumerate(codes) if other is site or shared(other)), None)


def _index(site: _Site, codes: Sequence[_Site]) -> int:
    found = _code_of(site, codes)
    assert found is not None
    return found


def _same(one: Factor, other: Factor) -> bool:
    return all(map(same, one.nodes(), other.nodes()))
