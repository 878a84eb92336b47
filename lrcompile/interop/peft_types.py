"""PEFT's types that compute what a method of ours does: the settings of each, the tensors, the names of both.

LORA     s·B·A, also with magnitudes (DoRA)         VERA   one pair for all sites, two vectors a site
ADALORA  s·B·diag(E)·A                              IA3    one gain for each output, or input of a feedforward layer
HIRA     W ⊙ B·A
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lrcompile.errors import SpecError
from lrcompile.recipes import scales
from lrcompile.recipes.recipe import Recipe
from lrcompile.specs import Spec

_INITS = {"kaiming": True, "gaussian": "gaussian", "orthogonal": "orthogonal"}
_BASE_KEEPING = ("eva",)
"""Initialisations that need data we are not given, but leave W as it is: their trained factors are plain LoRA."""

_TARGETS = ("target_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias")
_LORA_SETTINGS = ("r", "lora_alpha", "lora_dropout", "init_lora_weights", "rank_pattern", "exclude_modules", *_TARGETS)


@dataclass(frozen=True)
class PeftType:
    name: str
    forms: tuple[frozenset[str], ...]
    """The tensors of a form at one site, by our names."""
    scale: Callable[[Any, int, float], float]
    keys: Mapping[str, str]
    """By tensor: the end of its name in a file."""
    settings: frozenset[str]
    """Those that say something of what is computed, or trained."""
    write: Callable[[Spec], dict[str, Any]]
    """The numbers of a spec as settings."""
    read: Callable[[Mapping[str, Any], bool], dict[str, Any]]
    """The reverse: fields of a spec; for trained tensors, which need no initialisation, if the second is true."""
    refusal: Callable[[Spec], str | None] = lambda spec: None
    """What a spec says that these settings cannot."""
    shared: Mapping[str, str] = field(default_factory=dict)
    """By tensor that all sites share: its whole name."""
    bias: str = "lora_only"
    """What PEFT calls training the biases of the targets."""

    def why_not(self, method: Recipe, tensors: frozenset[str]) -> str | None:
        if method.scale is not self.scale:
            return "its scale is another function of alpha and rank"
        if tensors not in self.forms:
            return f"it keeps {', '.join(sorted(tensors))} at a site, PEFT {' and '.join(sorted(self.forms[0]))}"
        return None


def _write_lora(spec: Spec) -> dict[str, Any]:
    return {
        "r": spec.rank,
        "lora_alpha": plain(spec.alpha),
        "lora_dropout": spec.dropout,
        "use_rslora": spec.scaling == "alpha/sqrt(r)",
        "init_lora_weights": _INITS.get(spec.init, True),
        "rank_pattern": dict(spec.rank_pattern),
        "alpha_pattern": {key: plain(alpha) for key, alpha in spec.alpha_pattern.items()},
    }


def _read_lora(data: Mapping[str, Any], trained: bool) -> dict[str, Any]:
    return {
        "method": "dora" if data.get("use_dora") else "lora",
        "rank": data.get("r", 8),
        "alpha": data.get("lora_alpha", 8),
        "dropout": data.get("lora_dropout") or 0.0,
        "rank_pattern": data.get("rank_pattern") or {},
        "alpha_pattern": data.get("alpha_pattern") or {},
        "scaling": "alpha/sqrt(r)" if data.get("use_rslora") else "alpha/r",
        "init": _init(data.get("init_lora_weights", True), trained),
    }


def _init(given: Any, trained: bool) -> str:
    for name, theirs in _INITS.items():
        if given is theirs or (isinstance(given, str) and given == theirs):
            return name
    if given in (False, None, "true", "True") or (trained and given in _BASE_KEEPING):
        return "kaiming"
    if given in _BASE_KEEPING:
        raise SpecError(
            f"init_lora_weights={given!r} starts from data; choose one of {', '.join(map(repr, _INITS))} as init",
            field="init",
        )
    raise SpecError(
        f"init_lora_weights={given!r} also changes the base weights, so its factors mean something on that base"
        " only; save it with"
        " PEFT's save_pretrained(path_initial_model_for_weight_conversion=...), which gives plain LoRA",
        field="init",
    )


_ADALORA = {
    "target_r": ("target_rank", 8),
    "total_step": ("total_steps", None),
    "tinit": ("tinit", 0),
    "tfinal": ("tfinal", 0),
    "deltaT": ("delta_t", 1),
    "beta1": ("beta1", 0.85),
    "beta2": ("beta2", 0.85),
    "orth_reg_weight": ("orth_weight", 0.5),
}
"""By PEFT's name: ours, and PEFT's default."""


def _write_adalora(spec: Spec) -> dict[str, Any]:
    return {
        "init_r": spec.rank,
        "lora_alpha": plain(spec.alpha),
        "lora_dropout": spec.dropout,
        "init_lora_weights": True,
        "rank_pattern": None,
        **{theirs: spec.options[ours] for theirs, (ours, _) in _ADALORA.items()},
    }


def _read_adalora(data: Mapping[str, Any], trained: bool) -> dict[str, Any]:
    if data.get("total_step") is None:
        raise SpecError("PEFT's total_step is not given; an AdaLoRA budget needs it", field="total_step")
    rank, alpha = data.get("init_r", 12), data.get("lora_alpha", 8)
    return {
        "method": "adalora",
        "rank": rank,
        "alpha": rank if isinstance(alpha, (int, float)) and alpha <= 0 else alpha,  # as PEFT takes it
        "dropout": data.get("lora_dropout") or 0.0,
        **{ours: data.get(theirs, default) for theirs, (ours, default) in _ADALORA.items()},
    }


def _no_patterns(spec: Spec) -> str | None:
    if spec.rank_pattern or spec.alpha_pattern:
        return "PEFT's AdaLoRA starts with one rank and one alpha everywhere"
    return None


def _write_vera(spec: Spec) -> dict[str, Any]:
    return {
        "r": spec.rank,
        "vera_dropout": spec.dropout,
        "d_initial": spec.d_initial,
        "projection_prng_key": spec.seed or 0,
        "save_projection": True,
        "init_weights": True,
    }


def _read_vera(data: Mapping[str, Any], trained: bool) -> dict[str, Any]:
    return {
        "method": "vera",
        "rank": data.get("r", 256),
        "dropout": data.get("vera_dropout") or 0.0,
        "d_initial": data.get("d_initial", 0.1),
        "seed": data.get("projection_prng_key", 0),
    }


def _write_ia3(spec: Spec) -> dict[str, Any]:
    return {"init_ia3_weights": True, "feedforward_modules": list(spec.feedforward)}


def _read_ia3(data: Mapping[str, Any], trained: bool) -> dict[str, Any]:
    given = data.get("feedforward_modules")
    if given is None:
        raise SpecError(
            "feedforward_modules is not given, so PEFT would choose by architecture; name them, or give []",
            field="feedforward_modules",
        )
    if not isinstance(given, str) and not (
        isinstance(given, (list, tuple, set)) and all(isinstance(each, str) for each in given)
    ):
        raise SpecError(f"feedforward_modules must be a list of names, got {given!r}", field="feedforward_modules")
    if isinstance(given, str) and not trained:
        raise SpecError(
            f"feedforward_modules={given!r} is a regular expression, which has no counterpart; list name suffixes",
            field="feedforward_modules",
        )
    # for a model at hand, the layers it means are found there and named
    return {"method": "ia3", "feedforward": () if isinstance(given, str) else tuple(sorted(given))}


def _only_modules(spec: Spec) -> str | None:
    if spec.bias != "none" or spec.layers is not None:
        return "PEFT's (IA)³ trains no biases and is not restricted to layers"
    return None


def _write_hira(spec: Spec) -> dict[str, Any]:
    return {
        "r": spec.rank,
        "hira_dropout": spec.dropout,
        "init_weights": "gaussian" if spec.init == "gaussian" else True,
    }


def _read_hira(data: Mapping[str, Any], trained: bool) -> dict[str, Any]:
    given = data.get("init_weights", True)
    if given not in (True, False, None, "gaussian"):
        raise SpecError(f"init_weights={given!r}; expected true, false or 'gaussian'", field="init_weights")
    return {
        "method": "hira",
        "rank": data.get("r", 32),
        "dropout": data.get("hira_dropout") or 0.0,
        "init": "gaussian" if given == "gaussian" else "kaiming",
    }


def _one_rank(spec: Spec) -> str | None:
    if spec.rank_pattern:
        return "PEFT 0.21's HiRA takes no notice of its rank_pattern"
    return "PEFT's HiRA trains no biases" if spec.bias != "none" else None


def plain(number: float) -> float | int:
    return int(number) if float(number).is_integer() else number


LORA = PeftType(
    "LORA",
    forms=(frozenset("AB"), frozenset("ABm")),
    scale=scales.alpha_over_rank,
    keys={"A": "lora_A.weight", "B": "lora_B.weight", "m": "lora_magnitude_vector"},
    settings=frozenset([*_LORA_SETTINGS, "use_rslora", "use_dora", "alpha_pattern", "target_parameters"]),
    write=_write_lora,
    read=_read_lora,
)
ADALORA = PeftType(
    "ADALORA",
    forms=(frozenset("ABE"),),
    scale=scales.initial_rank,
    keys={"A": "lora_A", "B": "lora_B", "E": "lora_E"},
    settings=frozenset([*_LORA_SETTINGS, *_ADALORA, "init_r"]),
    write=_write_adalora,
    read=_read_adalora,
    refusal=_no_patterns,
)
VERA = PeftType(
    "VERA",
    forms=(frozenset(["A", "B", "lambda_b", "lambda_d"]),),
    scale=scales.one,
    keys={"lambda_b": "vera_lambda_b", "lambda_d": "vera_lambda_d"},
    settings=frozenset(
        [*_TARGETS, "r", "vera_dropout", "d_initial", "projection_prng_key", "save_projection", "init_weights"]
    ),
    write=_write_vera,
    read=_read_vera,
    refusal=lambda spec: "PEFT's VeRA has no exclude_modules" if spec.exclude else None,
    shared={"A": "base_model.vera_A", "B": "base_model.vera_B"},
    bias="vera_only",
)
IA3 = PeftType(
    "IA3",
    forms=(frozenset(["gain"]),),
    scale=scales.one,
    keys={"gain": "ia3_l"},
    settings=frozenset(
        ["target_modules", "exclude_modules", "modules_to_save", "feedforward_modules", "init_ia3_weights"]
    ),
    write=_write_ia3,
    read=_read_ia3,
    refusal=_only_modules,
)
HIRA = PeftType(
    "HIRA",
    forms=(frozenset("AB"),),
    scale=scales.one,
    keys={"A": "hira_A", "B": "hira_B"},
    settings=frozenset(["r", "hira_dropout", "init_weights", "exclude_modules", *_TARGETS[:-1]]),
    write=_write_hira,
    read=_read_hira,
    refusal=_one_rank,
)
TYPES = {each.name: each for each in (LORA, ADALORA, VERA, IA3, HIRA)}
