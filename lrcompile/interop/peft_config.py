"""A config of PEFT's and a `Spec`, both ways; what has no counterpart is refused by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from lrcompile.errors import SpecError
from lrcompile.interop.peft_types import TYPES, PeftType
from lrcompile.recipes import recipe
from lrcompile.recipes.forms.adapter import Adapter
from lrcompile.recipes.recipe import part
from lrcompile.sites.site import Site
from lrcompile.specs import Spec

MAX_RANK = 1 << 24
_HARMLESS = frozenset(
    [
        "peft_type",
        "task_type",
        "revision",
        "inference_mode",
        "base_model_name_or_path",
        "peft_version",
        "auto_mapping",
        "fan_in_fan_out",
        "megatron_core",
        "qalora_group_size",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "runtime_config",
    ]
)
"""Say nothing about what is computed: bookkeeping, what the model tells itself, options of other settings."""

_UNSUPPORTED = {
    "lora_bias": "it adds a bias to B; merge it with PEFT, or train base biases with bias='lora_only'",
    "layer_replication": "it builds another model; replicate the layers of the base first, then drop this setting",
    "trainable_token_indices": "train the embedding with train_modules, or adapt it as a target",
    "ensure_weight_tying": "adapters of tied weights are independent here; drop this setting",
    "megatron_config": "Megatron's parallel layers are not supported; gather the model first",
    "alora_invocation_tokens": "activated LoRA depends on the tokens; there is no counterpart",
    "use_qalora": "it pools inputs by group; there is no counterpart",
    "velora_config": "it changes the backward pass only: drop this setting to use the factors as plain LoRA",
    "kasa_config": "it changes the base weight; merge it with PEFT",
    "monteclora_config": "it samples the factors; merge it with PEFT",
    "use_bdlora": "its factors are block-diagonal; merge it with PEFT",
    "arrow_config": "it routes between adapters; there is no counterpart",
}


def spec_from_peft(config: Any) -> Spec:
    """The spec of a `LoraConfig`, `AdaLoraConfig`, `VeraConfig`, `IA3Config` or `HiraConfig`, or of the mapping of an
    `adapter_config.json`.

    `target_modules` and `target_parameters` become `targets`, `modules_to_save` becomes `train_modules`, `use_rslora`
    a `scaling`, `use_dora` the method "dora". `init_lora_weights` False (PEFT's random B, meant for tests) becomes
    "kaiming": B starts at 0. Raises `SpecError` naming each setting that has no counterpart, with what to do about it.
    """
    data = settings_of(config)
    return Spec.from_dict(numbers_from_peft(data) | targets_from_peft(data))


def spec_to_peft(spec: Spec, **more: Any) -> dict[str, Any]:
    """The mapping PEFT reads as `adapter_config.json`; `more` replaces or adds settings of PEFT by name.

    A spec alone does not say which targets are modules and which are raw parameters: all go to `target_modules`, and
    whoever has the model (`lrcompile.save`) gives both lists. Raises `SpecError` for a method that PEFT has no type
    for.
    """
    kind = type_of(spec)
    if unknown := sorted(set(more) - kind.settings - _HARMLESS - set(_UNSUPPORTED)):
        raise SpecError(f"PEFT's {kind.name} has no setting {', '.join(map(repr, unknown))}", field=unknown[0])
    targets: dict[str, Any] = {
        "target_modules": spec.targets if isinstance(spec.targets, str) else list(spec.targets),
        "exclude_modules": _or_none(spec.exclude),
        "layers_to_transform": _or_none(spec.layers or ()),
        "layers_pattern": None,
        "modules_to_save": _or_none(spec.train_modules),
        "bias": kind.bias if spec.bias == "lora_only" else spec.bias,
    }
    data: dict[str, Any] = {
        "peft_type": kind.name,
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "fan_in_fan_out": False,
        **kind.write(spec),
        **{key: value for key, value in targets.items() if key in kind.settings},
    }
    if "m" in form_of(spec):
        data["use_dora"] = True
    return data | more


def type_of(spec: Spec, tensors: Iterable[str] | None = None) -> PeftType:
    """The PEFT type that computes what `spec` does with these tensors (its form's own) at each site; `SpecError` saying
    why none does.
    """
    method = recipe(spec.method)
    kind = TYPES.get(method.peft or "")
    if kind is None:
        reason: str | None = "PEFT does not have it"
    else:
        reason = kind.why_not(method, form_of(spec) if tensors is None else frozenset(tensors)) or kind.refusal(spec)
    if kind is None or reason is not None:
        raise SpecError(f"{spec.method} has no counterpart in PEFT: {reason}", field="method")
    return kind


def form_of(spec: Spec) -> frozenset[str]:
    """The parameters of the method's form at a linear map, shared ones included."""
    method = recipe(spec.method)
    if method.form is None:
        return frozenset()
    form: type[Adapter] = part(method.form)
    site, meta = Site("", "linear", "", "weight", 1, 1), torch.device("meta")
    if (rank := spec.rank_of(site.name)) > MAX_RANK:
        raise SpecError(f"rank is {rank}; no adapter has", field="rank")
    shared = form.share(spec, [site], dtype=torch.float32, device=meta)
    adapter = form.build(spec, site, shared, dtype=torch.float32, device=meta)
    return frozenset(name for name, _ in adapter.named_parameters())


def settings_of(config: Any) -> dict[str, Any]:
    """The settings of a config object or mapping, every one of them known to be supported or harmless."""
    data = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(data, Mapping) or not all(isinstance(key, str) for key in data):
        raise SpecError(
            f"a PEFT config is a LoraConfig or a mapping of settings, got {type(config).__name__}", field="method"
        )
    kind = kind_of(data)
    for key, value in data.items():
        if key in _UNSUPPORTED and value:
            raise SpecError(f"PEFT's {key}={value!r} is not supported: {_UNSUPPORTED[key]}", field=key)
        if key not in _UNSUPPORTED | dict.fromkeys(_HARMLESS | kind.settings) and value:
            raise SpecError(
                f"PEFT's {key}={value!r} is not known here, so what it changes is not; merge the adapter with PEFT",
                field=key,
            )
    for key in ("target_modules", "exclude_modules"):
        if isinstance(data.get(key), str):
            _require_pattern(key, data[key])
    for key in ("modules_to_save", "layers_pattern"):  # PEFT puts these names into regular expressions as they are
        for entry in names_in(data, key):
            _require_pattern(key, entry)
    return dict(data)


def kind_of(data: Mapping[str, Any]) -> PeftType:
    given = data.get("peft_type")
    name = str(getattr(given, "value", given))
    if name not in TYPES:
        raise SpecError(
            f"peft_type is {name}; only {', '.join(TYPES)} can be read. Convert it with PEFT, or merge it there",
            field="peft_type",
        )
    return TYPES[name]


def _require_pattern(key: str, text: str) -> None:
    try:
        re.compile(text)
    except re.error as error:
        raise SpecError(f"PEFT's {key}={text!r} is not a regular expression: {error}", field=key) from error


def numbers_from_peft(data: Mapping[str, Any], *, trained: bool = False) -> dict[str, Any]:
    """The fields of a spec but for its targets; `trained` tensors need no initialisation, only an untouched base."""
    modules = data.get("modules_to_save")
    if modules is not None and (isinstance(modules, str) or not isinstance(modules, (list, tuple, set))):
        raise SpecError(f"modules_to_save must be a list of names, got {modules!r}", field="modules_to_save")
    kind = kind_of(data)
    bias = data.get("bias") or "none"
    return kind.read(data, trained) | {
        "bias": "lora_only" if bias == kind.bias else bias,
        "train_modules": tuple(sorted(modules)) if isinstance(modules, set) else tuple(modules or ()),
    }


def names_in(data: Mapping[str, Any], key: str) -> list[str]:
    """A setting that is a list of names, one name, or absent."""
    value = data.get(key) or []
    value = sorted(value) if isinstance(value, (set, frozenset)) else [value] if isinstance(value, str) else value
    if not isinstance(value, (list, tuple)) or not all(isinstance(entry, str) and entry for entry in value):
        raise SpecError(f"PEFT's {key} must be a list of names, got {value!r}", field=key)
    return list(value)


def layers_in(data: Mapping[str, Any]) -> list[int] | None:
    """`layers_to_transform` as a list; PEFT takes an empty one for none given."""
    layers = data.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    if layers and not (isinstance(layers, (list, tuple)) and all(isinstance(index, int) for index in layers)):
        raise SpecError(
            f"PEFT's layers_to_transform must be a list of integers, got {layers!r}", field="layers_to_transform"
        )
    return list(layers) if layers else None


def targets_from_peft(data: Mapping[str, Any]) -> dict[str, Any]:
    modules = data.get("target_modules")
    raw = [name.removesuffix(".weight") for name in names_in(data, "target_parameters")]
    layers, patterns = layers_in(data), names_in(data, "layers_pattern")
    excluded = data.get("exclude_modules")
    out: dict[str, Any] = {
        "exclude": excluded if isinstance(excluded, str) else tuple(names_in(data, "exclude_modules"))
    }
    if modules is None and not raw:
        raise SpecError(
            "target_modules is not given, so PEFT would choose by architecture; name the targets",
            field="target_modules",
        )
    if isinstance(modules, str):
        if layers:
            raise SpecError("PEFT's layers_to_transform needs target_modules to be a list", field="layers_to_transform")
        if modules.lower() == "all-linear":
            if raw:
                raise SpecError(
                    "'all-linear' beside target_parameters has no counterpart; list the modules",
                    field="target_parameters",
                )
            return out | {"targets": "all-linear"}
        return out | {"targets": f"(?:{modules})|{_suffixes(raw)}" if raw else modules}
    names = [*names_in(data, "target_modules"), *raw]
    if layers and patterns:
        indices = "|".join(map(str, layers))
        return out | {"targets": rf"(?:.*\.)?(?:{'|'.join(patterns)})\.(?:{indices})\.{_suffixes(names)}"}
    return out | {"targets": tuple(names), "layers": layers}


def _suffixes(names: list[str]) -> str:
    return rf"(?:.*\.)?(?:{'|'.join(map(re.escape, names))})"


def _or_none(names: Any) -> Any:
    return names if isinstance(names, str) else list(names) or None
