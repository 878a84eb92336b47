"""What a method is, as data: nothing here imports torch, so `lrcompile methods` answers at once.

    method = adapter form × initialiser × scale rule × step rules (optimizer policy, schedule) × auxiliary loss

Each part is an import path `package.module:name`, fetched when it is first used, and knows nothing of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from lrcompile.recipes.scales import alpha_over_rank

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""What NF4 takes."""
COMPUTE_DTYPES = ("bfloat16", "float16", "float32", "float64")

PAIR = "lrcompile.recipes.forms.pair:LoraAdapter"


@dataclass(frozen=True)
class Option:
    """A field that only some methods have: its default, a test of validity, and the words for what is valid.

    A default of `REQUIRED` makes the field one that must be given.
    """

    default: Any
    valid: Callable[[Any], bool]
    expected: str


REQUIRED = object()


@dataclass(frozen=True)
class Recipe:
    """A named method: its parts by import path, the fields it has, and what it promises."""

    name: str
    summary: str
    """The map it computes, or what it does to training, in one line."""
    paper: str
    """arXiv number."""
    form: str | None = PAIR
    """The adapter form (a `recipes.forms.adapter.Adapter`); None: only parameters of the base train."""
    trains: tuple[str, ...] = ("A", "B")
    """The form's tensors that train; the others stay as they start."""
    init: str | None = None
    """A function `(adapter, start)` that runs after the form's own start."""
    calibration: str | None = None
    """A `recipes.calibration` class that measures on the user's data what `init` needs."""
    scale: Callable[[Any, int, float], float] = alpha_over_rank
    """`(spec, rank, alpha)` → s."""
    rules: tuple[str, ...] = ()
    """`optim.rule.Rule` classes: what happens around each optimizer step."""
    optimizer: str | None = None
    """The optimizer class that the method is; None: it goes with any."""
    aux: str | None = None
    """A function `(adapters, spec)` → the loss added to the model's."""
    options: Mapping[str, Option] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Of common fields, where they differ from a `Spec`'s own."""
    lacks: Mapping[str, str] = field(default_factory=dict)
    """Common fields the method has not, each with the reason."""
    check: Callable[[Any], None] | None = None
    """`(spec)` raises `SpecError` where fields that are valid each do not go together."""
    any_rank: bool = False
    """Ranks above min(in, out) make sense."""
    quantizes_base: bool = False
    """The method keeps its targeted base weights in NF4."""
    nf4: str | None = None
    """Why it cannot train beside an NF4 base; None: it can."""
    writes_base: bool = False
    """Training changes the base weights themselves."""
    merges: str = "exactly"
    """What folding the adapter into the weight keeps, in a word or two."""
    peft: str | None = None
    """The PEFT type its checkpoints use, where one exists."""


def part(path: str) -> Any:
    """What an import path `package.module:name` names."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def integer(default: Any, least: int) -> Option:
    return Option(
        default,
        lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= least,
        f"an integer of at least {least}",
    )


def integer_or_none(default: Any, least: int, none: str) -> Option:
    """`none`: what leaving it out means."""
    return Option(
        default,
        lambda v: v is None or (isinstance(v, int) and not isinstance(v, bool) and v >= least),
        f"an integer of at least {least}, or None for {none}",
    )


def number(default: Any, expected: str, valid: Callable[[float], bool]) -> Option:
    """A finite number for which `valid` holds."""
    return Option(
        default,
        lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < float("inf") and valid(v),
        expected,
    )


def choice(default: Any, *choices: Any) -> Option:
    return Option(
        default,
        lambda v: any(v is c or (v == c and type(v) is type(c)) for c in choices),
        "one of " + ", ".join(map(repr, choices)),
    )
