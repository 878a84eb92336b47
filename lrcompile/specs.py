"""The spec: a frozen, validated description of a method and its targets. Pure data; importing it does not import
torch.
"""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrcompile.errors import SpecError
from lrcompile.names import Patterns, is_name
from lrcompile.recipes import recipe
from lrcompile.recipes.recipe import REQUIRED

if TYPE_CHECKING:
    from typing import Self

SCALINGS = ("alpha/r", "alpha/sqrt(r)")
INITS = ("kaiming", "gaussian", "orthogonal")
BIASES = ("none", "all", "lora_only")
DTYPES = ("float32", "bfloat16", "float16", "float64")

_LARGEST = sys.float_info.max
_SMALLEST_SCALE, _LARGEST_SCALE = 2.0**-126, 2.0**127  # float32's normal numbers


@dataclass(frozen=True)
class Spec:
    """A method, its targets and its numbers. Build one with `lrcompile.spec`; every field is checked here, once.

    `targets` and `exclude` follow PEFT: a list matches names by suffix, a string is a regular expression for whole
    names, and "all-linear" is every linear map but output head, embeddings and mixture routers. `rank_pattern` and
    `alpha_pattern` map a name suffix (or regular expression for it) to a number. `layers` restricts to these layer
    indices. `dtype` None: float32, or the base's if wider. `seed` None: torch's global generator. Fields of one method
    only are in `options`, readable as attributes.
    """

    method: str
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"
    exclude: str | tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    scaling: str = "alpha/r"
    init: str = "kaiming"
    bias: str = "none"
    train_modules: tuple[str, ...] = ()
    dtype: str | None = None
    seed: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        method = recipe(self.method)
        put = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731 (the one way to normalise a frozen dataclass)
        put("rank", _integer("rank", self.rank, 1))
        put("alpha", _number("alpha", self.alpha, "a finite number above 0", lambda v: v > 0))
        put("dropout", _number("dropout", self.dropout, "a number in [0, 1)", lambda v: 0 <= v < 1))
        put("targets", _names("targets", self.targets))
        put("exclude", _names("exclude", () if self.exclude is None else self.exclude))
        put("train_modules", _list("train_modules", () if self.train_modules is None else self.train_modules))
        if not self.targets:
            raise SpecError(
                "targets is empty: give name suffixes, a regular expression, or 'all-linear'", field="targets"
            )
        if self.layers is not None:
            layers = (self.layers,) if isinstance(self.layers, int) else self.layers
            if not isinstance(layers, (list, tuple, range)):
                raise SpecError(f"layers must be a layer index or a list of them, got {layers!r}", field="layers")
            put("layers", tuple(_integer("layers", index, 0) for index in layers))
        put("rank_pattern", {k: _integer("rank_pattern", v, 1) for k, v in _mapping("rank_pattern", self.rank_pattern)})
        positive = ("a finite number above 0", lambda v: v > 0)
        put(
            "alpha_pattern",
            {k: _number("alpha_pattern", v, *positive) for k, v in _mapping("alpha_pattern", self.alpha_pattern)},
        )
        _choice("scaling", self.scaling, SCALINGS)
        _choice("init", self.init, INITS)
        _choice("bias", self.bias, BIASES)
        if self.dtype is not None:
            _choice("dtype", self.dtype, DTYPES)
        if self.seed is not None:
            put("seed", _integer("seed", self.seed, 0))
            if self.seed >= 2**63:
                raise SpecError(f"seed must be below 2**63, got {self.seed}", field="seed")
        put("options", self._checked_options(method.options))
        if method.check is not None:
            method.check(self)

    def _checked_options(self, known: Mapping[str, Any]) -> dict[str, Any]:
        for name in self.options:
            if name not in known:
                common = [field for field in COMMON if field not in recipe(self.method).lacks]
                _refuse_field(name, self.method, [*common, *known])
        given = {name: self.options.get(name, option.default) for name, option in known.items()}
        if missing := [name for name, value in given.items() if value is REQUIRED]:
            raise SpecError(
                f"{self.method} needs {missing[0]}: {known[missing[0]].expected}; the method has no usual value for it",
                field=missing[0],
            )
        for name, value in given.items():
            if not known[name].valid(value):
                raise SpecError(
                    f"{name}={value!r} is not valid for {self.method}: expected {known[name].expected}", field=name
                )
        return given

    def __getattr__(self, name: str) -> Any:
        options = self.__dict__.get("options", {})
        if name in options:
            return options[name]
        raise AttributeError(f"a {self.__dict__.get('method', '?')!r} spec has no field {name!r}")

    def rank_of(self, site: str) -> int:
        return next((self.rank_pattern[key] for key in self.rank_keys.hitting(site)), self.rank)

    def alpha_of(self, site: str) -> float:
        return next((self.alpha_pattern[key] for key in self.alpha_keys.hitting(site)), self.alpha)

    @cached_property
    def rank_keys(self) -> Patterns:
        return Patterns(self.rank_pattern)

    @cached_property
    def alpha_keys(self) -> Patterns:
        return Patterns(self.alpha_pattern)

    def scale_of(self, site: str) -> float:
        """s at this site; `SpecError` where float32, in which adapters keep it, has no such number."""
        scale = recipe(self.method).scale(self, self.rank_of(site), self.alpha_of(site))
        if not _SMALLEST_SCALE <= scale <= _LARGEST_SCALE:
            raise SpecError(f"alpha gives a scale of {scale:.3g} at {site!r}, which float32 cannot hold", field="alpha")
        return scale

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings; `Spec.from_dict` gives an equal spec back."""
        out = {name: getattr(self, name) for name in COMMON if name not in recipe(self.method).lacks}
        return {"method": self.method} | {k: _plain(v) for k, v in (out | dict(self.options)).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        if not isinstance(data, Mapping):
            raise SpecError(f"a spec is a mapping of fields, got {type(data).__name__}", field="method")
        if "method" not in data:
            raise SpecError("a spec needs the field 'method'", field="method")
        for name in data:
            if not isinstance(name, str):
                raise SpecError(f"field names are strings, got {name!r}", field=str(name))
        method = recipe(data["method"])
        for name, reason in method.lacks.items():
            if name in data:
                raise SpecError(f"{method.name} has no {name}: {reason}", field=name)
        given = {**method.defaults, **data}
        known = {"method", *COMMON}
        options = {name: given.pop(name) for name in list(given) if name not in known}
        return cls(**given, options=options)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read YAML or JSON; a file that is neither, or holds anything but fields, is a `SpecError`."""
        import yaml

        try:
            text = Path(path).read_text(encoding="utf-8")
            # YAML takes JSON's 1e-05 for text, so what is JSON is read as that
            data = json.loads(text) if Path(path).suffix == ".json" else yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # bad bytes, dates and numbers are ValueErrors
            raise SpecError(f"{path} is neither YAML nor JSON: {error}", field="method") from error
        if not isinstance(data, Mapping):
            raise SpecError(f"{path} holds no fields; expected 'method: lora' and the like", field="method")
        return cls.from_dict(data)

    def dump(self, path: str | Path) -> None:
        """Write JSON when the suffix is `.json`, YAML otherwise."""
        import yaml

        from lrcompile.writing import atomic_file

        data = self.to_dict()
        text = json.dumps(data, indent=2) if Path(path).suffix == ".json" else yaml.safe_dump(data, sort_keys=False)
        with atomic_file(path) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def from_peft(cls, config: Any) -> Spec:
        """The spec of a PEFT config (object or the mapping of an `adapter_config.json`); unsupported settings are
        refused by name.
        """
        from lrcompile.interop.peft_config import spec_from_peft

        return spec_from_peft(config)

    def to_peft(self, **more: Any) -> dict[str, Any]:
        """The mapping PEFT writes as `adapter_config.json`."""
        from lrcompile.interop.peft_config import spec_to_peft

        return spec_to_peft(self, **more)


COMMON = tuple(f.name for f in fields(Spec) if f.name not in ("method", "options"))


def spec(method: str, **fields: Any) -> Spec:
    """A validated `Spec` of the recipe `method` (see `lrcompile.methods()`).

    Raises `SpecError` naming the field, the value given and what would be valid.
    """
    return Spec.from_dict({"method": method, **fields})


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value


def _refuse_field(name: str, method: str, known: list[str]) -> None:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise SpecError(f"{method} has no field {name!r}{hint} Its fields: {', '.join(known)}", field=name)


def _integer(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SpecError(f"{name} must be an integer of at least {least}, got {value!r}", field=name)
    return value


def _number(name: str, value: Any, expected: str, valid: Any) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST
    if not number or not valid(value):
        raise SpecError(f"{name} must be {expected}, got {value!r}", field=name)
    return float(value)


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise SpecError(f"{name}={value!r} is not valid: choose one of {', '.join(map(repr, choices))}", field=name)


def _list(name: str, value: Any) -> tuple[str, ...]:
    listed = isinstance(value, (list, tuple, set, frozenset))
    if not listed or not all(isinstance(entry, str) and entry for entry in value):
        raise SpecError(f"{name} must be a list of names, got {value!r}", field=name)
    return tuple(sorted(value) if isinstance(value, (set, frozenset)) else value)


def _names(name: str, value: Any) -> str | tuple[str, ...]:
    if not isinstance(value, str):
        return _list(name, value)
    try:
        re.compile(value)
    except re.error as error:
        raise SpecError(f"{name}={value!r} is not a regular expression: {error}", field=name) from error
    return value


def _mapping(name: str, value: Any) -> list[tuple[str, Any]]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise SpecError(f"{name} must map names to numbers, got {value!r}", field=name)
    for key in value:
        try:
            if not is_name(key):
                re.compile(key)
        except re.error as error:
            raise SpecError(f"{name} key {key!r} is not a regular expression: {error}", field=name) from error
    return list(value.items())
