"""group-by-input: [x·W₁ᵀ + s₁(x·A₁ᵀ)B₁ᵀ, …] = x·[W₁; …]ᵀ + diag(s₁B₁, …)·(x·[A₁; …]ᵀ)."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from lrcompile.lowered.group import AdaptedGroup, Member, Role
from lrcompile.passes.base import Equivalence, Pass, Refusal, Result, Stage
from lrcompile.passes.captured import Linear, drop_dead, linear_at, operator_of, same, value, writes
from lrcompile.passes.nodes import LORA, PROJECT


@dataclass(frozen=True)
class GroupByInput(Pass[fx.GraphModule]):
    """[x·W₁ᵀ + s₁(x·A₁ᵀ)B₁ᵀ, …] = x·[W₁; …]ᵀ + diag(s₁B₁, …)·(x·[A₁; …]ᵀ): maps of one input become one node.

    The node is a `lowered.AdaptedGroup`: one product for all codes, the expand in the base's own buffer, one gradient
    of x; a single map is a group of one. Methods may differ, ranks and widths too; equal A (VeRA's) are read once.
    Refuses where another node sees y in between, the weight trains or is computed, or dropout is active.
    """

    name: ClassVar[str] = "group-by-input"
    stage: ClassVar[Stage] = "dynamo"
    preserves: ClassVar[Equivalence] = "reassociation"

    def apply(self, subject: fx.GraphModule) -> Result:
        graph, refusals, found = subject.graph, [], []
        for node in graph.nodes:
            if operator_of(node) in (LORA, PROJECT):
                site = _site(node)
                if isinstance(site, _Site):
                    found.append(site)
                else:
                    refusals.append(Refusal(node.name, site))
        groups = _grouped(graph, found)
        for group in groups:
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
    A: fx.Node
    B: fx.Node
    scale: fx.Node | None


def _site(node: fx.Node) -> _Site | str:
    y = node.args[0]
    linear = linear_at(y)
    if linear is None:
        return "its base is no linear map with a frozen weight"
    if len(y.users) != 1:  # type: ignore[union-attr]
        return "another node sees the base's output"
    if node.args[1] is not linear.x:
        return "the adapter and the base have different inputs"
    if operator_of(node) is LORA:
        _, _, A, B, scale, p = (*node.args, 0.0)[:6]
        if p:
            return f"dropout {p} is active"
        if value(A).dim() != 2:
            return "its factors are a stack"
        return _Site(node, linear, "pair", A, B, scale)  # type: ignore[arg-type]
    _, _, Z, P, right = node.args
    return _Site(node, linear, "right", P, Z, None) if right else _Site(node, linear, "left", Z, P, None)  # type: ignore[arg-type]


def _grouped(graph: fx.Graph, sites: Sequence[_Site]) -> list[list[_Site]]:
    """Sites of one input, as far as all can be computed where the first is."""
    place = {node: index for index, node in enumerate(graph.nodes)}
    barriers = [place[node] for node in graph.nodes if writes(node)]
    groups: list[list[_Site]] = []
    for site in sites:
        for group in groups:
            first, last = place[group[0].node], place[site.node]
            apart = any(first < barrier < last for barrier in barriers)
            if group[0].linear.x is site.linear.x and not apart and _ahead(site, group, place) is not None:
                group.append(site)
                break
        else:
            groups.append([site])
    return groups


def _ahead(site: _Site, group: Sequence[_Site], place: dict[fx.Node, int]) -> list[fx.Node] | None:
    """The nodes behind the group's first that `site` needs, in order; None if one of them needs the group."""
    first = place[group[0].node]
    needed: set[fx.Node] = set()
    waiting = [node for node in _operands(site) if node is not None]
    while waiting:
        node = waiting.pop()
        if place[node] > first and node not in needed:
            needed.add(node)
            waiting += node.all_input_nodes
        elif any(node is each.node for each in group):
            return None
    return sorted(needed, key=place.__getitem__)


def _operands(site: _Site) -> tuple[fx.Node | None, ...]:
    return (*site.linear.held, site.linear.bias, site.A, site.B, site.scale)


def _lower(graph: fx.Graph, group: Sequence[_Site]) -> None:
    place = {node: index for index, node in enumerate(graph.nodes)}
    anchor = group[0].node
    for site in group[1:]:
        for node in _ahead(site, group[:1], place) or ():
            anchor.prepend(node)
    codes: list[_Site] = []
    for site in sorted(group, key=lambda each: ("pair", "right", "left").index(each.role)):
        if _code_of(site, codes) is None:
            codes.append(site)
    members = tuple(Member(each.linear.base, _index(each, codes), each.role) for each in group)
    lowered = AdaptedGroup(members, len(codes))
    operands = lowered.operands(
        [each.linear.held for each in group],
        [each.linear.bias for each in group],
        [each.B for each in group],
        [each.scale for each in group],
        [each.A for each in codes],
    )
    outputs: tuple[Any, ...] = tuple(value(each.node) for each in group)
    with graph.inserting_before(anchor):
        node = graph.call_function(lowered, (group[0].linear.x, *operands))
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
        return other.role == site.role != "left" and same(other.A, site.A)

    return next((index for index, other in enumerate(codes) if other is site or shared(other)), None)


def _index(site: _Site, codes: Sequence[_Site]) -> int:
    found = _code_of(site, codes)
    assert found is not None
    return found
