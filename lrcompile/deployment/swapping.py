"""Adapters as what a deployed graph is given when it runs: the places it keeps for them, and what each puts there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from lrcompile.adapters import ADAPTERS
from lrcompile.errors import ExportError
from lrcompile.passes.expand_slots import TURNED
from lrcompile.recipes.forms.adapter import Adapter, NotSwappable
from lrcompile.recipes.forms.hosted import wide_dtype
from lrcompile.recipes.forms.slot import NAME, PAIR, Slot
from lrcompile.sites.site import Site
from lrcompile.state import State, adapter_set, all_sites, has_state, state_of
from lrcompile.switching import rewrite_graphs, switched_off
from lrcompile.walking import submodule
from lrcompile.wording import listed
from lrcompile.written import written_by

_RANK = 2  # of what stands in for a pair while a graph is captured, where no rank may leave a trace


@dataclass(frozen=True)
class GraphInput:
    """An input of the graph that has a default; `shape` names the rank, which an adapter chooses."""

    name: str
    held: str
    """The captured program's name of the tensor whose place it takes."""
    dtype: torch.dtype
    shape: tuple[int | str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "dtype": str(self.dtype).removeprefix("torch."), "shape": list(self.shape)}


@dataclass(frozen=True)
class Swappable:
    """One adapter of a model: its tensors by the graph input that takes them, and what the manifest says of it."""

    name: str
    method: str
    weight: float
    """What it is active with, which its tensors contain; 1 while it is not."""
    tensors: Mapping[str, Tensor]
    sites: Mapping[str, Mapping[str, Any]]
    parameters: tuple[str, ...]
    """What it trained in full."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "weight": self.weight,
            "sites": {name: dict(site) for name, site in self.sites.items()},
            "parameters": list(self.parameters),
        }


@dataclass
class Slots:
    """The places of a model: what each site holds, and the adapters that go there."""

    model: nn.Module
    adapters: tuple[Swappable, ...]
    holds: dict[Site, frozenset[str]] = field(default_factory=dict)

    @property
    def reads_weights(self) -> list[str]:
        """Adapters of which a part is a function of the weight's values."""
        gains = {name for site, held in self.holds.items() if "row_gain" in held for name in [f"{site.name}.row_gain"]}
        return [each.name for each in self.adapters if gains & each.tensors.keys()]

    def inputs(self, program: ExportedProgram) -> tuple[tuple[GraphInput, ...], tuple[str, ...]]:
        """The graph inputs that a captured program has a tensor for, and the names of those it never reads."""
        found, unread, held = [], [], _read(program)
        for site, parts in self.holds.items():
            for part in sorted(parts):
                name = input_name(site.name, part)
                target = next((each for each in _slot_names(site, part) if each in held), None)
                if target is None:
                    unread.append(name)
                    continue
                shape: list[int | str] = [*held[target].shape]
                if part in PAIR:
                    shape[-1 if part == "A" else -2] = f"{site.name}.rank"
                found.append(GraphInput(name, target, held[target].dtype, tuple(shape)))
        places: dict[tuple[int, torch.Size], list[str]] = {}
        for target, tensor in held.items():
            places.setdefault((tensor.data_ptr(), tensor.shape), []).append(target)
        for name in dict.fromkeys(name for each in self.adapters for name in each.parameters):
            parameter = self.model.get_parameter(name)
            match places.get((parameter.data_ptr(), parameter.shape), []):
                case [target]:
                    found.append(GraphInput(name, target, parameter.dtype, tuple(parameter.shape)))
                case []:
                    unread.append(name)
                case several:
                    raise ExportError(f"{name}, which an adapter trained in full, is in the graph as {listed(several)}")
        return tuple(found), tuple(unread)


def _read(program: ExportedProgram) -> dict[str, Tensor]:
    """The tensors of the program that it reads."""
    used = {node.name for node in program.graph.nodes if node.op == "placeholder" and node.users}
    names = [str(spec.target) for spec in program.graph_signature.input_specs if spec.arg.name in used]
    return {name: program.state_dict[name] for name in names if name in program.state_dict}


_NAMES = {"A": "lora_A.weight", "B": "lora_B.weight"}  # as PEFT calls them


def input_name(site: str, part: str) -> str:
    """What the graph calls its input for this part of a slot."""
    return f"{site}.{_NAMES.get(part, part)}".lstrip(".")


def _slot_names(site: Site, part: str) -> Iterator[str]:
    """What a program may call this part of the slot at `site`, whose module may go by several names."""
    for name in site.names:
        host = name if site.slot == "weight" else name.removesuffix(site.slot).rstrip(".")
        yield f"{host}.{ADAPTERS}.{site.slot}.{NAME}.{TURNED.get(part, part)}".lstrip(".")


@contextmanager
def slotted(model: nn.Module) -> Iterator[Slots]:
    """Within the block `model` computes the base's values through a slot at every site that an adapter has.

    Raises `ExportError` for a model without adapters, a merged one, and an adapter that no graph can be given.
    """
    with swappable(model) as slots:
        state = state_of(model)
        _refuse_taken(model, slots)
        sets = {site: adapter_set(model, site) for site in slots.holds}
        try:
            for site, adapters in sets.items():
                adapters.attach(NAME, _slot(model, site, slots.holds[site]))
                adapters.active = (NAME,)
            rewrite_graphs(model, all_sites(state))
            yield slots
        finally:
            for adapters in sets.values():
                if NAME in adapters:
                    adapters.detach(NAME)
            rewrite_graphs(model, all_sites(state))


@contextmanager
def swappable(model: nn.Module, name: str | None = None) -> Iterator[Slots]:
    """The adapters of `model` (or the one called `name`); within the block the model computes the base's values."""
    if not has_state(model):
        raise ExportError(
            f"this {type(model).__name__} has no adapter, and what its graph would be given is decided by those it has:"
            " lrcompile.apply or lrcompile.load one first, or leave adapters='inputs' out"
        )
    state = state_of(model)
    if state.merged:
        raise ExportError(
            f"{', '.join(map(repr, state.merged))} is merged into the weights; lrcompile.unmerge(model) first, so that"
            " base and adapter leave apart"
        )
    if name is not None and name not in state.specs:
        raise ExportError(f"there is no adapter {name!r}; there are: {', '.join(map(repr, state.specs))}")
    with switched_off(model):
        slots = Slots(model, tuple(_swappable(model, state, each) for each in ([name] if name else state.specs)))
        for adapter in slots.adapters:
            for site in state.sites[adapter.name]:
                held = {part for part in Slot.shapes(1, 1, 1) if input_name(site.name, part) in adapter.tensors}
                slots.holds[site] = slots.holds.get(site, frozenset()) | held
        yield slots


def _swappable(model: nn.Module, state: State, name: str) -> Swappable:
    spec, weight = state.specs[name], state.active.get(name, 1.0)
    if written := [*written_by(model, name), *sorted(state.trained.written.get(name, ()))]:
        raise ExportError(
            f"adapter {name!r} ({spec.method}) has written base weights ({written[0]}, …), which cannot be swapped:"
            " lrcompile.merge(model, final=True) and export the model itself"
        )
    tensors: dict[str, Tensor] = {}
    sites: dict[str, dict[str, Any]] = {}
    for site in state.sites[name]:
        adapter: Adapter = adapter_set(model, site)[name]
        try:
            with _weighted(adapter, weight):
                found = adapter.swappable(submodule(model, site.host))
        except NotSwappable as reason:
            raise ExportError(
                f"adapters='inputs': adapter {name!r} ({spec.method}) at {site.name} cannot be an input: {reason}."
                " Use adapters='merge' or 'inline', or lrcompile.remove it"
            ) from reason
        sites[site.name] = {"rank": found["A"].shape[-1] if "A" in found else 0, "scale": adapter.scale_value}
        tensors |= {input_name(site.name, part): value for part, value in found.items()}
    parameters = state.trained.names_of(name)
    tensors |= {each: state.trained.value(model, name, each).detach() for each in parameters}
    if broken := [each for each, value in tensors.items() if not bool(torch.isfinite(value).all())]:
        raise ExportError(
            f"adapter {name!r} holds NaN or infinite values at {broken[0]}: its training diverged; load an earlier"
            " checkpoint, or lrcompile.remove it"
        )
    return Swappable(name, spec.method, weight, tensors, sites, parameters)


@contextmanager
def _weighted(adapter: Adapter, weight: float) -> Iterator[None]:
    """With the scale that the adapter acts with at `weight`; an inactive one remembers another."""
    before = adapter.weight
    if before == weight:
        yield
        return
    try:
        adapter.weight = weight
        adapter.refill_scale()
        yield
    finally:
        adapter.weight = before
        adapter.refill_scale()


def _slot(model: nn.Module, site: Site, holds: frozenset[str]) -> Slot:
    beside = next(iter(adapter_set(model, site)._modules.values()))
    device = beside.scale.device  # type: ignore[union-attr]
    host = submodule(model, site.host)
    dtype = wide_dtype(host) if holds - set(PAIR) else torch.float32  # gains near one keep their digits
    made = Slot(
        site.in_features, site.out_features, _RANK, 1.0,
        holds=holds, transposed=site.transposed, copies=site.copies, dtype=dtype, device=device,
    )  # fmt: skip
    return made.eval()


def _refuse_taken(model: nn.Module, slots: Slots) -> None:
    own = set(model.state_dict())
    names = {input_name(each, part) for site, held in slots.holds.items() for each in site.names for part in held}
    if taken := sorted(own & names):
        raise ExportError(f"the model itself has a tensor {taken[0]!r}, which is to be the name of an adapter's input")
