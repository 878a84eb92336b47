"""What a candidate is held against: a module's float64, or, where no side is a module, a file as it runs.

A module has a true float64 (`float64`) and, from it, y64 and D. A file has not: its own outputs are the reference, and
D is measured in ONNX Runtime by the same replays on an ONNX graph, the reference's or else the candidate's (of a
function both compute, it is the same D). Between two compiled packages, or a recording and a package, nothing can be
replayed, so there is no bound and no verdict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from lrcompile.errors import VerificationError
from lrcompile.verifying.comparing import Expected
from lrcompile.verifying.float64 import float64_copy, float64_mode, widen_inputs
from lrcompile.verifying.intermediates import arguments, enclosing, has_graph
from lrcompile.verifying.outputs import Inputs, aligned, call, named_outputs, selected
from lrcompile.verifying.places import deviation_ratio, examine, local_value, submodule_value
from lrcompile.verifying.replay import SEEDS, Deviation, Magnitudes, perturbed, unit_roundoff, working_dtype
from lrcompile.verifying.routing import choices_of, forcing, recording
from lrcompile.verifying.runners import ModuleRunner, Runner, evaluating
from lrcompile.verifying.verdict import Place

if TYPE_CHECKING:
    from lrcompile.interop.onnxruntime import OnnxRunner


_ADAPTERS = "lrcompile_adapters"


class Reference(Protocol):
    """`exact` names the first rung; `steps` says whether the reference's own run is one of its own."""

    exact: str
    label: str
    steps: bool
    size: int | None

    @property
    def dtype(self) -> str: ...

    def own(self, sets: list[Inputs], outputs: Sequence[str] | None) -> list[dict[str, Tensor]]: ...

    def expected(
        self, sets: list[Inputs], own: list[dict[str, Tensor]], choices: list[list[Tensor]] | None = None
    ) -> list[Expected]: ...

    def places(self, candidate: Runner, inputs: Inputs) -> tuple[Place, ...] | str: ...

    def local(self, candidate: Runner, inputs: Inputs, place: str) -> Deviation | None: ...


class ModuleReference:
    """float64 of an eager module; `base` is the model without its adapter where the module no longer knows it."""

    exact, steps = "float64", True

    def __init__(self, module: nn.Module, sets: list[Inputs], base: nn.Module | None = None):
        self.module, self.base = module, base
        own = ModuleRunner(module)
        self.label = f"reference: {own.label}"
        self.size: int | None = own.size
        self._dtype = working_dtype(module, sets)
        self.roundoff = unit_roundoff(self._dtype)

    @property
    def dtype(self) -> str:
        return str(self._dtype).removeprefix("torch.")

    def own(self, sets: list[Inputs], outputs: Sequence[str] | None) -> list[dict[str, Tensor]]:
        return [selected(one, outputs, "the reference") for one in map(ModuleRunner(self.module).run, sets)]

    def expected(
        self, sets: list[Inputs], own: list[dict[str, Tensor]], choices: list[list[Tensor]] | None = None
    ) -> list[Expected]:
        """y64, D and the base's y64 for each set of inputs; the doubled copies live one at a time. `choices` has what
        routers are to take; None: what they take in the module's own dtype.
        """
        twin, names, expected = float64_copy(self.module), list(own[0]), []
        for index, given in enumerate(sets):
            free: list[Tensor] = []
            exact = _run64(twin, given, names, recording(free))
            taken = free if not free else choices_of(self.module, given) if choices is None else choices[index]
            if any(not torch.equal(one.cpu(), other.cpu()) for one, other in zip(free, taken, strict=False)):
                exact = _run64(twin, given, names, forcing(taken))
            bounds = {name: Deviation(value, self.roundoff) for name, value in exact.items() if _inexact(value)}
            magnitudes = Magnitudes()
            for seed in SEEDS if bounds else ():
                with forcing(taken) if taken else nullcontext():
                    replayed = _run64(twin, given, names, perturbed(self.roundoff, seed, magnitudes))
                for name, bound in bounds.items():
                    bound.update(replayed[name])
            integers = {name: value for name, value in exact.items() if not _inexact(value)}
            expected.append(Expected(bounds, integers, choices=taken, free=free))
        del twin
        plain = self.base_copy()
        if plain is not None:
            for want, given in zip(expected, sets, strict=True):
                without = _run64(plain, given, None)
                exact = {**want.integers, **{name: bound.exact for name, bound in want.bounds.items()}}
                found = aligned({name: exact[name] for name in names}, without, "the base")
                want.base = {name: value for name, value in found.items() if _inexact(value)}
        return expected

    def draws(self, inputs: Inputs) -> bool:
        """Do its outputs depend on torch's random numbers?"""
        found = []
        with torch.random.fork_rng(devices=[]):
            for seed in (0, 1):
                torch.manual_seed(seed)
                found.append(ModuleRunner(self.module).run(inputs))
        return any(not torch.equal(value.nan_to_num(), found[1][name].nan_to_num()) for name, value in found[0].items())

    def places(self, candidate: Runner, inputs: Inputs) -> tuple[Place, ...] | str:
        find = getattr(candidate, "intermediates", None)
        if find is None:
            return f"no first divergence: {candidate.label} shows no intermediate values"
        return examine(self.module, self.base_copy(), find, inputs, self.roundoff)

    def local(self, candidate: Runner, inputs: Inputs, place: str) -> Deviation | None:
        """What should stand at `place`, given what the candidate hands to it; of a module candidate, what the module
        that makes it should give.
        """
        if isinstance(candidate, ModuleRunner) and not has_graph(candidate.module) and not has_graph(self.module):
            given = arguments(candidate.module, inputs, enclosing(place))
            return submodule_value(self.module, enclosing(place), given, self.roundoff)
        find = getattr(candidate, "intermediates", None)
        return None if find is None else local_value(self.module, find, inputs, self.roundoff, place)

    def base_copy(self) -> nn.Module | None:
        """The float64 copy of what the module computes without its adapters, or None if it has none."""
        if self.base is not None:
            return float64_copy(self.base)
        if "_lrcompile" not in self.module.__dict__:
            return None
        from lrcompile.switching import switched_off

        # Copied inside the context, so that a merged reference is copied with the base's bits in place.
        with switched_off(self.module):
            return float64_copy(self.module)


class FileReference:
    """A file's own outputs; D from replays of `graph`, which is the file or an ONNX candidate."""

    steps = False

    def __init__(self, values: Runner, graph: OnnxRunner, base: Runner | None = None):
        from lrcompile.interop.onnx_replay import working_roundoff

        self.values, self.graph, self.base = values, graph, base
        self.exact, self.label = values.label, f"reference: {values.label}"
        self.size = getattr(values, "size", None)
        self._dtype, self.roundoff = working_roundoff(graph.model)

    @property
    def dtype(self) -> str:
        return f"{self._dtype}, measured on {self.graph.label}"

    def own(self, sets: list[Inputs], outputs: Sequence[str] | None) -> list[dict[str, Tensor]]:
        return [selected(one, outputs, self.values.label) for one in map(self.values.run, sets)]

    def expected(
        self, sets: list[Inputs], own: list[dict[str, Tensor]], choices: list[list[Tensor]] | None = None
    ) -> list[Expected]:
        expected = []
        for given, mine in zip(sets, own, strict=True):
            exact = {name: _wide(value) for name, value in mine.items() if _inexact(value)}
            bounds = {name: Deviation(value, self.roundoff) for name, value in exact.items()}
            measured = self._deviations(mine, given)
            for name, bound in bounds.items():
                bound.bound = max(bound.bound, measured[name].bound)
            base = None
            if self.base is not None:
                without = aligned(mine, self.base.run(given), self.base.label)
                base = {name: _wide(value) for name, value in without.items() if _inexact(value)}
            expected.append(
                Expected(bounds, {name: value for name, value in mine.items() if not _inexact(value)}, base)
            )
        return expected

    def _deviations(self, mine: dict[str, Tensor], given: Inputs) -> dict[str, Deviation]:
        from lrcompile.interop.onnx_replay import replayed

        plain = aligned(mine, self.graph.run(given), self.graph.label)
        found = {name: Deviation(_wide(value), self.roundoff) for name, value in plain.items() if _inexact(value)}
        for seed in SEEDS:
            moved = self.graph.outputs_of(replayed(self.graph.model, self.roundoff, seed), given)
            for name, value in aligned(mine, moved, self.graph.label).items():
                if name in found:
                    found[name].update(_wide(value))
        return found

    def places(self, candidate: Runner, inputs: Inputs) -> tuple[Place, ...] | str:
        from lrcompile.interop.onnxruntime import OnnxRunner

        if self.values is not self.graph or not isinstance(candidate, OnnxRunner):
            both = f"{candidate.label} and {self.values.label}"
            return f"no first divergence: {both} do not both show intermediate values"
        expected = self._deviations_inside(inputs)
        found = candidate.intermediates(inputs, {name: place.exact.shape for name, place in expected.items()})
        values = {name: found[name].value for name in expected if name in found}
        local, rows = self._deviations_from(inputs, values), []
        for name, value in values.items():
            ratio, largest = deviation_ratio(value, expected[name])
            own, _ = deviation_ratio(value, local[name])
            rows.append(Place(name, ratio, own, largest, node=found[name].node))
        return tuple(rows)

    def local(self, candidate: Runner, inputs: Inputs, place: str) -> Deviation | None:
        """What the file makes at `place` of the values that the candidate hands to it."""
        expected = self._deviations_inside(inputs)
        find = getattr(candidate, "intermediates", None)
        if find is None or self.values is not self.graph:
            return expected.get(place)
        found = find(inputs, {name: each.exact.shape for name, each in expected.items()})
        return self._deviations_from(inputs, {name: each.value for name, each in found.items()}).get(place)

    def _deviations_from(self, inputs: Inputs, values: Mapping[str, Tensor]) -> dict[str, Deviation]:
        """As `places.forced`, in the graph: each place goes on with the candidate's value instead of its own."""
        from lrcompile.interop.onnx_replay import replayed

        dtypes = {name: value.dtype for name, value in self.graph.places(inputs).items()}
        wide = {name: _wide(value) for name, value in values.items()}
        given = {name: value.to(dtypes[name]) for name, value in wide.items()}
        local = {
            name: Deviation(_wide(value), self.roundoff)
            for name, value in self.graph.places_from(inputs, given).items()
        }
        for seed in SEEDS:
            coins = torch.Generator().manual_seed(seed)
            moved = {}
            for name, value in wide.items():
                sign = torch.randint(0, 2, value.shape, generator=coins) * 2 - 1
                moved[name] = (value * (1 + self.roundoff * sign)).to(dtypes[name])
            model = replayed(self.graph.model, self.roundoff, seed)
            for name, value in self.graph.places_from(inputs, moved, model).items():
                local[name].update(_wide(value))
        return local

    def _deviations_inside(self, inputs: Inputs) -> dict[str, Deviation]:
        from lrcompile.interop.onnx_replay import replayed

        found = self.graph.places(inputs)
        # What a node makes on the way is not the same in a merged graph and in one that keeps the pair; a module's is.
        modules = {name: value for name, value in found.items() if "%" not in name and _ADAPTERS not in name}
        expected = {name: Deviation(_wide(value), self.roundoff) for name, value in (modules or found).items()}
        for seed in SEEDS:
            moved = self.graph.places(inputs, replayed(self.graph.model, self.roundoff, seed))
            for name, place in expected.items():
                place.update(_wide(moved[name]))
        return expected


def file_reference(values: Runner, candidates: list[Runner], base: Runner | None) -> FileReference:
    """The reference that a file or a recording is; raises `VerificationError` where nothing gives a bound."""
    from lrcompile.interop.onnxruntime import OnnxRunner

    graph = next((one for one in (values, *candidates) if isinstance(one, OnnxRunner)), None)
    if graph is None:
        others = ", ".join(one.label for one in candidates)
        raise VerificationError(
            f"{values.label} against {others}: neither is a module or an ONNX graph, so nothing says how far rounding "
            "may carry them apart; give the model (a module, its folder) or its .onnx file as one side"
        )
    return FileReference(values, graph, base)


def _run64(
    twin: nn.Module, given: Inputs, outputs: Sequence[str] | None, inside: AbstractContextManager[None] | None = None
) -> dict[str, Tensor]:
    with evaluating(twin), float64_mode(), inside or nullcontext():
        try:
            result = call(twin, widen_inputs(given))
        except (RuntimeError, TypeError, ValueError, LookupError) as error:
            raise VerificationError(
                f"the reference runs in its own type, but not in float64: {type(error).__name__}: {error}"
            ) from error
        return selected(named_outputs(result), outputs, "the reference")


def _inexact(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _wide(value: Tensor) -> Tensor:
    return value.cpu().to(torch.complex128 if value.is_complex() else torch.float64)
