"""Models of golden cases: what is stored of one, and how it is rebuilt without importing anything a golden names."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lrcompile.errors import LrcompileError, VerificationError, require
from lrcompile.verifying.golden_files import Case

_ADAPTERS = "lrcompile_adapters"
_ATTENTION = ("eager", "sdpa")
_REMOTE = ("auto_map", "quantization_config", "backbone", "use_pretrained_backbone", "use_timm_backbone")
_MAX_COUNT = 1 << 16
_MAX_UNSTORED = 64 << 20


def describe(model: nn.Module) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any] | None]:
    """The parts of a case that say how to rebuild `model`: itself, its adapters, its quantization."""
    return _architecture(model), _adapters(model), _quantization(model)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """`base/…`: the model without its adapters; `adapter/…`: what differs with them."""
    if "_lrcompile" not in model.__dict__:
        return {f"base/{key}": value for key, value in model.state_dict().items()}
    from lrcompile.switching import switched_off

    with switched_off(model):
        base = {key: value.clone() for key, value in model.state_dict().items() if _ADAPTERS not in key}
    full = model.state_dict()
    own = {key: value for key, value in full.items() if key not in base or not _same(value, base[key])}
    return {f"base/{key}": value for key, value in base.items()} | {
        f"adapter/{key}": value for key, value in own.items()
    }


def rebuild(case: Case, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The model of a `transformers` case from its stored configuration, with the stored tensors."""
    model = case.model
    if model.get("kind") != "transformers":
        raise VerificationError(
            f"this case holds a {model.get('class')!r}, not a transformers model: "
            "give model=, or build='package.module:function'"
        )
    return furnish(_transformers_model(model, tensors), case, tensors)


def built(build: str) -> nn.Module:
    """What the caller's own `package.module:function` returns."""
    module, _, function = build.partition(":")
    if not module or not function:
        raise VerificationError(f"build={build!r}: 'package.module:function' is expected")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise VerificationError(f"build={build!r} cannot be found: {error}") from error
    try:
        made = found() if callable(found) else found
    except TypeError as error:
        raise VerificationError(f"build={build!r} cannot be called without arguments: {error}") from error
    if not isinstance(made, nn.Module):
        raise VerificationError(f"build={build!r} returned a {type(made).__name__}, not a module")
    return made


def furnish(model: nn.Module, case: Case, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Put the stored quantization, base tensors, adapters and their tensors into a model of the right architecture."""
    import lrcompile

    try:
        base = {key.removeprefix("base/"): value for key, value in tensors.items() if key.startswith("base/")}
        if case.quantization is not None:
            _store(model, case.quantization, base)
        model.load_state_dict(base, strict=True, assign=True)
        for entry in case.adapters:
            lrcompile.apply(model, lrcompile.Spec.from_dict(entry["spec"]), name=entry["name"])
        if case.adapters:
            lrcompile.activate(
                model, {entry["name"]: entry["weight"] for entry in case.adapters if entry["weight"] is not None}
            )
    except (RuntimeError, KeyError, TypeError, LrcompileError) as error:
        raise VerificationError(f"the stored tensors or adapters do not fit the model: {error}") from error
    _load_adapters(model, {k.removeprefix("adapter/"): v for k, v in tensors.items() if k.startswith("adapter/")})
    return model


def differing(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of stored tensors that `model` lacks, has more, or has with other values."""
    own = tensors_of(model)
    return [
        name
        for name in sorted({*own, *tensors})
        if name not in own or name not in tensors or not _same(own[name], tensors[name])
    ]


def _same(left: Tensor, right: Tensor) -> bool:
    """Equal bits of equal type; NaN equals itself."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return torch.equal(_bytes(left), _bytes(right))


def _bytes(value: Tensor) -> Tensor:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _architecture(model: nn.Module) -> dict[str, Any]:
    name, config = type(model).__name__, getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if not (type(model).__module__.startswith("transformers.") and kind and name in _known_classes(kind)):
        return {"kind": "code", "class": name}
    assert config is not None
    plain = {
        key: value
        for key, value in config.to_dict().items()
        if not key.startswith("_") and key != "transformers_version"
    }
    _refuse_remote(plain)
    attention = getattr(config, "_attn_implementation", None)
    if attention not in (None, *_ATTENTION):
        raise VerificationError(f"attention implementation {attention!r} cannot be stored; {', '.join(_ATTENTION)} can")
    return {"kind": "transformers", "class": name, "model_type": kind, "config": plain, "attention": attention}


def _adapters(model: nn.Module) -> list[dict[str, Any]]:
    if "_lrcompile" not in model.__dict__:
        return []
    from lrcompile.state import state_of

    state = state_of(model)
    if state.merged:
        raise VerificationError("the model is merged; record it before merging, or after merge(final=True)")
    return [
        {"name": name, "spec": spec.to_dict(), "weight": state.active.get(name)} for name, spec in state.specs.items()
    ]


def _quantization(model: nn.Module) -> dict[str, Any] | None:
    from lrcompile.storage import described_maps

    return described_maps(model) or None


def _store(model: nn.Module, described: dict[str, Any], base: Mapping[str, Tensor]) -> None:
    """Give the maps of a plain model the stored codes; the tensors are looked at before anything changes."""
    from lrcompile.safe_tensors import Entry
    from lrcompile.storage import attach_maps, checked_maps, coded_entries, misfits

    maps = checked_maps(model, described)
    expected = coded_entries(model, maps)
    found = {name: Entry(base[name].dtype, tuple(base[name].shape)) for name in expected if name in base}
    if faults := misfits(found, expected):
        raise VerificationError("; ".join(faults))
    attach_maps(maps, base)


def _load_adapters(model: nn.Module, stored: Mapping[str, Tensor]) -> None:
    full = model.state_dict()
    for key, value in stored.items():
        if key not in full or full[key].shape != value.shape:
            raise VerificationError(f"the stored adapter tensor {key!r} {tuple(value.shape)} has no place in the model")
        full[key].copy_(value)
    missing = [key for key in full if _ADAPTERS in key and key not in stored]
    if missing:
        raise VerificationError(f"the case lacks the adapter tensors {', '.join(missing[:5])}")


def _transformers_model(stored: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    """Only class names in transformers' own tables are looked up; sizes are known from the meta device before memory
    is taken.
    """
    transformers = require("transformers", "hf")
    if set(stored) != {"kind", "class", "model_type", "config", "attention"} or not isinstance(stored["config"], dict):
        raise VerificationError("the golden's model must have class, model_type, config and attention")
    kind, name, attention = stored["model_type"], stored["class"], stored["attention"]
    if not isinstance(kind, str) or name not in _known_classes(kind) or attention not in (None, *_ATTENTION):
        raise VerificationError(f"transformers knows no {name!r} of type {kind!r} with attention {attention!r}")
    _refuse_remote(stored["config"])
    invalid = require("huggingface_hub.errors", "hf").StrictDataclassError
    settings = {key: value for key, value in stored["config"].items() if key != "model_type"}
    dtypes = {value.dtype for key, value in tensors.items() if key.startswith("base/") and value.is_floating_point()}
    try:
        with torch.random.fork_rng(devices=[]):
            config = transformers.AutoConfig.for_model(kind, **settings)
            if attention is not None:
                config._attn_implementation = attention
            cls = getattr(transformers, name)
            with torch.device("meta"):
                blank = cls(config)
            _check_sizes(blank, tensors)
            model = cls(config)
    except (invalid, ValueError, TypeError, KeyError, AttributeError, RuntimeError, IndexError) as error:
        raise VerificationError(f"the stored configuration gives no {name}: {error}") from error
    return model.to(next(iter(dtypes))) if len(dtypes) == 1 else model


def _check_sizes(blank: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    stored = sum(value.numel() for value in tensors.values())
    claimed = sum(math.prod(value.shape) for value in (*blank.parameters(), *blank.buffers()))
    if claimed > 4 * stored + _MAX_UNSTORED:
        raise VerificationError(f"the stored configuration makes a model of {claimed} numbers, the case holds {stored}")


def _known_classes(kind: str) -> set[str]:
    """The class names that transformers' auto mappings list for a model type."""
    mappings = require("transformers.models.auto.modeling_auto", "hf")
    known: set[str] = set()
    for table in (value for key, value in vars(mappings).items() if key.endswith("_MAPPING_NAMES")):
        entry = table.get(kind, ()) if isinstance(table, Mapping) else ()
        known.update([entry] if isinstance(entry, str) else entry)
    return known


def _refuse_remote(config: Any) -> None:
    """A configuration must not lead to code or weights elsewhere, nor to a loop without end."""
    for key, value in _walk(config, 0):
        implementation = key.endswith("attn_implementation") and value not in (None, *_ATTENTION)
        if (key in _REMOTE and value) or implementation or "trust_remote_code" in key or "kernel_id" in key:
            raise VerificationError(f"a golden's configuration may not set {key}={value!r}")
        if isinstance(value, int) and ("num" in key or "layer" in key or "depth" in key) and abs(value) > _MAX_COUNT:
            raise VerificationError(f"a golden's configuration has {key}={value}; at most {_MAX_COUNT} are taken")


def _walk(value: Any, depth: int) -> Iterator[tuple[str, Any]]:
    if depth > 16:
        raise VerificationError("a golden's configuration nests too deeply")
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield str(key), item
        yield from _walk(item, depth + 1)
