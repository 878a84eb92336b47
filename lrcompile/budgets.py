"""Which form each map gets under a budget, and the table of why.

    minimise  Σₛ r(s, f(s))  where  Σₛ bytes(s, f(s)) ≤ budget        (or the other way round)

The choice is the greedy one on each map's lower convex hull of (bytes, r). Errors of different maps are taken to add up
in the mean square, as independent ones do.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lrcompile.errors import SpecError
from lrcompile.tables import render
from lrcompile.wording import sized

FLOAT, INT8, INT4, NF4 = "float", "int8", "int4", "nf4"
KINDS = ("bytes", "share", "error")
"""What a budget may limit: bytes of all targeted weights, their share of what they take now, ‖y' − y‖/‖y‖."""


@dataclass(frozen=True)
class Choice:
    """What one map got, and why."""

    name: str
    form: str
    bytes: int
    float_bytes: int
    error: float
    """‖X·(Ŵ − W)ᵀ‖/‖X·Wᵀ‖ on the calibration data; of X̂·Ŵᵀ − X·Wᵀ where integer inputs are counted."""
    moves: float
    """‖y' − y‖/‖y‖ of the model's outputs that is expected of this map alone."""
    moves_as_nf4: float
    """The same, measured, had it been stored as NF4."""
    reason: str


@dataclass(frozen=True)
class Allocation:
    """What each map got under a budget; prints as a table."""

    budget: Mapping[str, float]
    choices: tuple[Choice, ...]
    predicted: float
    """‖y' − y‖/‖y‖ expected of all of them together, inputs rounded or not as `integer_inputs` says."""
    measured: float
    """The same, of the quantized model on the calibration data: what it and its exact exports compute."""
    measured_integer_inputs: float
    """The same, as export(nf4_form="int8") ships it: inputs of the stored maps rounded to 8 bits, NF4 levels too."""
    integer_inputs: bool = False
    """Which of the two the budget and the choice are about."""

    @property
    def bytes(self) -> int:
        return sum(choice.bytes for choice in self.choices)

    @property
    def float_bytes(self) -> int:
        return sum(choice.float_bytes for choice in self.choices)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "bytes": self.bytes, "float_bytes": self.float_bytes}

    def __str__(self) -> str:
        rows = [
            (c.name, c.form, sized(c.bytes), f"{c.error:.2e}", f"{c.moves:.2e}", f"{c.moves_as_nf4:.2e}",
             c.reason)
            for c in self.choices
        ]  # fmt: skip
        ((kind, limit),) = self.budget.items()
        title = (
            f"budget: {kind} {limit:g}; {sized(self.bytes)} of {sized(self.float_bytes)}"
            f" ({self.bytes / self.float_bytes:.1%})"
        )
        counted = ("", " (counted)") if self.integer_inputs else (" (counted)", "")
        notes = (
            f"outputs moved on the calibration data: {self.measured:.2e} by the weights{counted[0]},"
            f' {self.measured_integer_inputs:.2e} as nf4_form="int8" ships it, inputs rounded to 8 bits{counted[1]};'
            f" {self.predicted:.2e} was expected",
            "its error: of the map's own outputs; moves outputs: the model's, by this map alone, as it is and as NF4",
        )
        columns = ("map", "stored as", "size", "its error", "moves outputs", "as NF4", "why")
        return render(columns, rows, title=title, notes=notes)


@dataclass(frozen=True)
class Chosen:
    """The form of each map, and what all of them together do to the outputs on the data, as ‖y' − y‖/‖y‖."""

    forms: dict[str, str]
    options: dict[str, Options]
    measured: float
    """With inputs as they come."""
    measured_integer_inputs: float
    """As export(nf4_form="int8") ships it."""


@dataclass
class Options:
    """The forms one map may take: bytes of each; own error and r of these and of NF4, which is what was measured."""

    bytes: dict[str, int]
    error: dict[str, float]
    r: dict[str, float]

    def steps(self) -> list[str]:
        """The forms on the lower convex hull of (bytes, r), smallest first."""
        hull: list[str] = []
        for form in sorted(self.bytes, key=lambda form: (self.bytes[form], self.r[form])):
            if hull and self.r[form] >= self.r[hull[-1]]:
                continue
            while len(hull) > 1 and self.gain(hull[-2], hull[-1]) <= self.gain(hull[-1], form):
                hull.pop()
            hull.append(form)
        return hull

    def gain(self, smaller: str, larger: str) -> float:
        """r saved for each byte spent."""
        return (self.r[smaller] - self.r[larger]) / max(1, self.bytes[larger] - self.bytes[smaller])


def checked_budget(budget: Any) -> dict[str, float]:
    """The budget as one kind and its limit, or a `SpecError` that says what there is."""
    expected = "expected one of {'bytes': N}, {'share': 0.3} (of what the weights take now), {'error': 0.02}"
    if not isinstance(budget, Mapping) or len(budget) != 1 or next(iter(budget)) not in KINDS:
        raise SpecError(f"budget is {budget!r}; {expected}", field="budget")
    ((kind, limit),) = budget.items()
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit < float("inf"):
        raise SpecError(f"budget {kind} is {limit!r}; {expected}", field="budget")
    return {kind: limit}


def within_bytes(options: Mapping[str, Options], most: float) -> dict[str, str]:
    hulls = {name: each.steps() for name, each in options.items()}
    forms = {name: hull[0] for name, hull in hulls.items()}
    spent = sum(options[name].bytes[form] for name, form in forms.items())
    if spent > most:
        raise SpecError(
            f"the budget allows {most:.0f} bytes for {len(options)} maps, and their smallest forms take {spent}; raise"
            " it, or exclude= maps",
            field="budget",
        )
    for _, name, larger in _ordered(options, hulls):
        cost = options[name].bytes[larger] - options[name].bytes[forms[name]]
        if spent + cost <= most:
            forms[name], spent = larger, spent + cost
    return forms


def within_error(options: Mapping[str, Options], limit: float) -> dict[str, str]:
    hulls = {name: each.steps() for name, each in options.items()}
    forms = {name: hull[0] for name, hull in hulls.items()}
    total = sum(options[name].r[form] for name, form in forms.items())
    for _, name, larger in _ordered(options, hulls):
        if total <= limit**2:
            break
        total += options[name].r[larger] - options[name].r[forms[name]]
        forms[name] = larger
    for name in sorted(forms, key=lambda name: -options[name].bytes[forms[name]]):  # the last step went beyond it
        for smaller in hulls[name]:
            back = options[name].r[smaller] - options[name].r[forms[name]]
            if total + back <= limit**2:
                total, forms[name] = total + back, smaller
                break
    return forms


def _ordered(options: Mapping[str, Options], hulls: Mapping[str, list[str]]) -> list[tuple[float, str, str]]:
    """Every step along a hull, the one first that saves most r a byte; those of one map stay in their order."""
    steps = [
        (options[name].gain(smaller, larger), name, larger)
        for name, hull in hulls.items()
        for smaller, larger in itertools.pairwise(hull)
    ]
    return sorted(steps, key=lambda step: -step[0])


def _choice(name: str, form: str, given: Options) -> Choice:
    smaller = [other for other in given.steps() if given.bytes[other] < given.bytes[form]]
    moves = {each: given.r[each] ** 0.5 for each in given.r}
    if smaller:
        saved = given.bytes[form] - given.bytes[smaller[-1]]
        reason = f"{smaller[-1]} would save {sized(saved)} and move outputs by {moves[smaller[-1]]:.1e}"
    else:
        reason = f"the smallest form, {given.bytes[form] / given.bytes[FLOAT]:.0%} of float"
    return Choice(name, form, given.bytes[form], given.bytes[FLOAT], given.error[form], moves[form], moves[NF4], reason)


def described(budget: Mapping[str, float], chosen: Chosen, integer_inputs: bool) -> Allocation:
    choices = tuple(_choice(name, form, chosen.options[name]) for name, form in chosen.forms.items())
    predicted = sum(choice.moves**2 for choice in choices) ** 0.5
    return Allocation(dict(budget), choices, predicted, chosen.measured, chosen.measured_integer_inputs, integer_inputs)
